"""What users install: wheel and sdist hold the linked folders as real files, and every form imports the same."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hatchling import build

SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # early 3.11 has none

ROOT = Path(__file__).parents[1]
LINKED = {"callbacks": "*.py", "configs": "*.yaml"}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Calls one of hatchling's build functions in a project folder, as pip and `python -m build` do."""

    def run(what: str, project: Path) -> Path:
        monkeypatch.chdir(project)
        out = tmp_path / "dist" / what / project.name
        out.mkdir(parents=True)
        return out / str(getattr(build, f"build_{what}")(str(out)))

    return run


def expected() -> set[str]:
    """Every file of the package as git would ship it, with the linked folders under lit_peft."""
    package = ROOT / "lit_peft"
    found = {*package.rglob("*")}
    for folder, pattern in LINKED.items():
        assert any((package / folder).rglob(pattern)), f"nothing in lit_peft/{folder}"
        found.update((package / folder).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file() and path.parent.name != "__pycache__"}


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [info for info in archive.infolist() if (info.external_attr >> 28) == 0xA], "a link inside a wheel"
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def imported_from(site: Path, elsewhere: Path) -> dict[str, str]:
    """Where a bare interpreter that knows only `site` finds the package and its callbacks."""
    code = f"""
import site; site.addsitedir({str(site)!r})
import lit_peft, lit_peft.callbacks
from lit_peft import callbacks
import importlib
assert callbacks is lit_peft.callbacks is importlib.import_module("lit_peft.callbacks")
print(lit_peft.__file__, callbacks.__file__, sep="\\n")
"""
    # -I -S: neither the checkout in the working folder nor an installed copy can answer instead
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(("lit_peft", "callbacks"), done.stdout.splitlines(), strict=True))


def test_links_point_to_the_top_level_folders() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked sdist holds folders instead of the links")
    for folder in LINKED:
        assert os.readlink(ROOT / "lit_peft" / folder) == f"../{folder}"


def test_wheel_holds_the_package_and_nothing_else(built: Callable[[str, Path], Path], tmp_path: Path) -> None:
    wheel = built("wheel", ROOT)
    files = contents(wheel)
    assert set(files) == expected()
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    found = imported_from(site, tmp_path)
    assert found["callbacks"] == str(site / "lit_peft" / "callbacks" / "__init__.py")
    metadata = next(site.glob("*.dist-info"))
    assert "lit-peft = lit_peft.__main__:main" in (metadata / "entry_points.txt").read_text()
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()


def test_sdist_builds_the_same_wheel(built: Callable[[str, Path], Path], tmp_path: Path) -> None:
    sdist = built("sdist", ROOT)
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive]
        assert all(member.isfile() for member in archive), "a link inside the sdist"
        archive.extractall(tmp_path, **SAFE)  # type: ignore[arg-type]
    assert len(names) == len(set(names)), "a file twice in the sdist"
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert {*expected(), *tests, "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".ckpt", ".safetensors"))]
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert contents(built("wheel", unpacked)) == contents(built("wheel", ROOT))


def test_editable_install_is_one_path_to_the_checkout(built: Callable[[str, Path], Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.unpack_archive(built("editable", ROOT), site, "zip")
    (line,) = next(site.glob("*.pth")).read_text().splitlines()
    assert Path(line) == ROOT
    assert imported_from(site, tmp_path)["callbacks"] == str(ROOT / "lit_peft" / "callbacks" / "__init__.py")


@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_pip_installs_it_with_its_command(form: str, built: Callable[[str, Path], Path], tmp_path: Path) -> None:
    """A real pip into a real environment; the libraries are lent from this one, so nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    package = ["-e", str(ROOT)] if form == "editable" else [str(built("wheel", ROOT))]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    lent = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run([*pip, *package], env=lent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(tmp_path / "env" / "bin" / "lit-peft"), "methods"], env=lent, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, "lora" in done.stdout) == (0, True), done.stderr


def test_what_the_quickstart_installs_can_convert_its_model() -> None:
    """`make quickstart` installs the extra `gguf` alone; the tests' own packages bring more, and would hide a lack."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {entry.partition(">")[0] for entry in extras["gguf"]} >= {"gguf", "accelerate"}
