"""The rules of the house: which room may import which, how long a file may be, and that ruff and mypy agree."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_peft

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_peft"
CALLBACKS = PACKAGE / "callbacks"  # a link in the checkout, which `rglob` does not follow, a folder in the sdist
SOURCES = sorted({*PACKAGE.rglob("*.py"), *CALLBACKS.rglob("*.py")})
PYTHON_FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

# room -> the rooms it may import (and always itself). A room is a file or a folder directly in lit_peft.
ROOMS = {
    "selection": "blocks",
    "choosing": "blocks selection",
    "adapter": "selection ops choosing",
    "combining": "",
    "placing": "adapter",
    "meaning": "adapter",
    "named": "selection adapter combining blocks",
    "weights": "",
    "quantised": "sites ops",
    "structure": "",
    "backbone": "quantised",
    "facts": "",
    "catalogue": "facts",
    "faults": "",
    "quiet": "",
    "strategies": "",
    "targets": "",
    "tensor_files": "",
    "forks": "",
    "virtual_tokens": "tensor_files",
    "template": "",
    "rewriting": "adapter weights",
    "kernels": "",
    "data": "template",
    "ops": "kernels",
    "sites": "structure",
    "sublayers": "structure",
    "positions": "structure",
    "prefixed": "ops",
    "gates": "selection",
    "module": "adapter",
    "foreign": "sites sublayers targets tensor_files",
    "hub": "adapter sites structure targets backbone tensor_files forks foreign virtual_tokens",
    "merging": "adapter weights hub backbone rewriting quantised",
    "callbacks": "adapter named weights module hub merging backbone faults rewriting tensor_files",
    "mixin": "selection adapter named ops module sites structure hub callbacks rewriting weights sets meaning "
    "quantised blocks",
    "low_rank": "adapter structure weights gates ops targets selection combining blocks",
    "methods": "adapter placing named sites structure targets weights low_rank hub rewriting mixin module "
    "callbacks ops combining selection sublayers prefixed gates blocks virtual_tokens positions "
    "template",
    "folders": "adapter module hub catalogue",
    "sets": "adapter named hub targets folders blocks forks",
    "tasks": "adapter ops module data backbone sites structure template",
    "zoo": "methods tasks catalogue module mixin",
    "comparing": "catalogue zoo module backbone faults quiet",
    "saved": "hub catalogue foreign",
    "restore": "adapter named zoo saved hub tensor_files backbone merging module catalogue forks",
    "blocks": "",
}
ROOMS["verbs"] = " ".join(ROOMS)
ROOMS["cli"] = ROOMS["__main__"] = " ".join([*ROOMS, "cli"])


def imported(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and full dotted name of every import below `node`, except those for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        elif isinstance(child, ast.Import):
            yield from ((child.lineno, name.name) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.lineno, f"{'.' * child.level}{child.module or ''}.{n.name}") for n in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from ((child.lineno, a.value) for a in child.args[:1] if isinstance(a, ast.Constant))
        yield from imported(child)


def new_arrows(room: str, where: str, source: str) -> list[str]:
    """Lists the imports in `source`, a file of `room`, that the table does not allow."""
    found = []
    for line, name in imported(ast.parse(source)):
        root, _, rest = name.partition(".")
        if root in ("callbacks", "tests", "configs"):
            found.append(f"{where}:{line} imports {name!r}: write lit_peft.callbacks, two names make two classes")
        elif not root:
            found.append(f"{where}:{line} imports {name!r} relatively: write the full name, lit_peft...")
        elif root == "lit_peft" and rest and not (rest.startswith("__") and rest != "__main__"):
            leaf = rest.partition(".")[0]
            target = lit_peft._HOME.get(leaf, leaf).partition(".")[0]  # lit_peft.LoRA lives in methods
            if target not in {room, *ROOMS[room].split()}:
                found.append(f"{where}:{line} is a new arrow, {room} -> {target}; {room} may import: {ROOMS[room]}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0].removesuffix(".py")
    if room == "__init__":
        return  # names its homes as strings, and imports them when they are asked for
    assert room in ROOMS, f"{inside} is a new room: enter it into ROOMS with what it may import"
    assert not (found := new_arrows(room, f"lit_peft/{inside}", path.read_text())), "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source", "arrow"),
    [
        ("sites", "import lit_peft.adapter", "sites -> adapter"),
        ("callbacks", "def late():\n    from lit_peft.methods.lora import LoRA", "callbacks -> methods"),
        ("tasks", "from lit_peft import LoRA", "tasks -> methods"),
        ("methods", "from lit_peft import tasks", "methods -> tasks"),
        ("data", "importlib.import_module('lit_peft.module')", "data -> module"),
        ("verbs", "from lit_peft.cli.app import LitPEFTCLI", "verbs -> cli"),
        ("module", "if TYPE_CHECKING:\n    import lit_peft.hub\nelse:\n    import lit_peft.zoo", "module -> zoo"),
        ("module", "from . import zoo", "relatively"),
        ("cli", "from callbacks import AdapterFreeze", "lit_peft.callbacks"),
    ],
)
def test_a_new_arrow_is_found_and_named(room: str, source: str, arrow: str) -> None:
    (found,) = new_arrows(room, "file.py", source)
    assert arrow in found


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    words = path.stem.lower().split("_")
    assert not {"utils", "util", "common", "helpers", "helper", "manager", "misc"}.intersection(words)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy --verbose"])
def test_checker_passes(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    if "mypy" in command:  # passing while not following the link would prove nothing about the callbacks
        for path in SOURCES:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            assert f"module='{module}'" in done.stderr


def test_import_is_light() -> None:
    heavy = "{'torch', 'lightning', 'transformers', 'datasets'}"
    code = f"import lit_peft, lit_peft.callbacks, sys; print(*{heavy}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("name", lit_peft.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(lit_peft, name) is not None
    assert name in dir(lit_peft)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Lora"):
        lit_peft.Lora  # noqa: B018
