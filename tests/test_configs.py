"""Every shipped YAML is parsed by the real command line, against the real signatures, and sets nothing in vain."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_peft.__main__ import main
from lit_peft.catalogue import FACTS, METHODS, TASKS
from lit_peft.cli.request import CONFIGS
from lit_peft.cli.shown import learning_rates
from lit_peft.zoo import compose
from tests.models import save_tiny

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
PARTS = [name for name in SHIPPED if not name.startswith("recipe/")]
WHOLE = [name for name in SHIPPED if name.startswith("recipe/")]
JOB = ("--model.backbone", "org/some-model", "--data.path", "some.jsonl")  # only parsed: neither is looked for

Parse = Callable[..., dict[str, Any]]


@pytest.fixture
def parse(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What `lit-peft fit ARGUMENTS` would run, with everything resolved; from a folder that holds no `configs`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> dict[str, Any]:
        try:
            code: object = main(["fit", *arguments, "--print_config"])
        except SystemExit as leaving:
            code = leaving.code
        printed, complaint = capsys.readouterr()
        assert not code, complaint
        found = yaml.safe_load(printed)
        assert isinstance(found, dict)
        return found

    return run


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `model.lora.r` and its value for every value of a configuration, class wrappers left out of the path."""
    if isinstance(content, dict) and content:
        for key, inner in content.items():
            yield from leaves(inner, path if key == "init_args" else f"{path}.{key}".lstrip("."))
    else:
        yield path, content


def read(name: str) -> dict[str, Any]:
    return dict(leaves(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())))


def test_link_is_the_folder() -> None:
    assert CONFIGS.resolve() == (ROOT / "configs").resolve()
    assert {name.partition("/")[0] for name in SHIPPED} == {"method", "task", "data", "trainer", "recipe"}


@pytest.mark.parametrize("name", SHIPPED)
def test_file_is_understood_and_taken_over(name: str, parse: Parse) -> None:
    found = dict(leaves(parse("-c", name, *(() if name in WHOLE else JOB))))
    for key, value in read(name).items():
        given_on_the_line = name not in WHOLE and f"--{key}" in JOB
        assert given_on_the_line or found[key] == value, key


@pytest.mark.parametrize("name", PARTS)
def test_file_sets_only_what_differs_from_the_defaults(name: str, parse: Parse) -> None:
    mine = read(name)
    flags = [word for key in ("method", "task") if key in mine for word in (f"--{key}", mine[key])]
    default = dict(leaves(parse(*flags, *JOB)))
    idle = [key for key, value in mine.items() if key not in ("method", "task") and default.get(key) == value]
    assert not idle, f"configs/{name}.yaml restates defaults: {', '.join(idle)}"


@pytest.mark.parametrize(("kind", "known"), [("method", METHODS), ("task", TASKS)])
def test_every_name_has_its_file(kind: str, known: dict[str, str]) -> None:
    for name in known:
        assert read(f"{kind}/{name}")[kind] == name
    for name in SHIPPED:
        if name.startswith(f"{kind}/"):
            assert set(str(read(name)[kind]).split("+")) <= set(known)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_methods_and_tasks_combine(method: str, task: str, parse: Parse) -> None:
    found = parse("-c", f"method/{method}", "-c", f"task/{task}", *JOB)
    names = [path.rpartition(".")[2] for path in (METHODS[method], TASKS[task])]
    assert found["model"]["class_path"] == f"lit_peft.zoo.{''.join(names)}"


def test_later_files_win_and_flags_win_over_all(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("model: {lr: 1.0e-3, lora: {r: 4, alpha: 3}}\ndata: {max_length: 99}\n")
    (tmp_path / "second.yaml").write_text("model: {lora: {r: 5}}\ntrainer: {max_steps: 7}\n")
    files = ("-c", "method/lora", "-c", "first.yaml", "-c", "second.yaml")
    found = dict(leaves(parse(*files, *JOB)))
    assert [found[f"model.{key}"] for key in ("lr", "lora.r", "lora.alpha")] == [1e-3, 5, 3]
    assert (found["data.max_length"], found["trainer.max_steps"]) == (99, 7)
    swapped = dict(leaves(parse("-c", "second.yaml", "-c", "first.yaml", *JOB)))
    assert (swapped["model.lora.r"], swapped["trainer.max_steps"]) == (4, 7)
    assert dict(leaves(parse(*files, *JOB, "--model.lora.r", "6")))["model.lora.r"] == 6
    assert parse("-c", "method/lora", "-c", "method/bitfit", *JOB)["model"]["class_path"] == "lit_peft.zoo.BitFitSFT"
    assert parse("-c", "method/lora", *JOB, "--method", "full")["model"]["class_path"] == "lit_peft.zoo.FullSFT"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {lora: {rank: 4}}", "rank"),
        ("trainer: {max_step: 4}", "max_step"),
        (
            "trainer: {strategy: {class_path: lightning.pytorch.strategies.DeepSpeedStrategy, init_args: {stge: 2}}}",
            "stge",
        ),
        ("data: {max_length: long}", "max_length"),
        ("- method", "key: value"),
    ],
)
def test_a_wrong_file_would_be_found(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "-c", "wrong.yaml", *JOB, "--print_config"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert complaint in lines[0]


def test_an_unknown_name_suggests_a_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "method/lorra", *JOB]) == 2
    assert "Did you mean method/lora?" in capsys.readouterr().err


VARIANTS = [name for name, facts in FACTS.items() if facts.keyword == "lora"]


@pytest.mark.parametrize("method", [*VARIANTS, "remora", "mam", "unipelt", "dora+loraplus"])
def test_what_is_printed_is_what_is_used(method: str, parse: Parse) -> None:
    printed = parse("--method", method, *JOB)
    Path("printed.yaml").write_text(yaml.safe_dump(printed))
    assert parse("--config", "printed.yaml") == printed
    settings = {key: value for key, value in printed["model"]["init_args"].items() if isinstance(value, dict)}
    assert settings
    for given in (printed["model"]["init_args"], {"backbone": "org/some-model"}):
        module: Any = compose(method, "sft")(**given)
        assert settings == {key: value for key, value in module.hparams.items() if key in settings}


@pytest.mark.parametrize("method", [*(name for name in METHODS if not FACTS[name].needs), "lora+bitfit"])
def test_rates_that_are_printed_are_those_in_use(method: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"mora": {"mora": {"r": 2}}, "remora": {"mora": {"r": 2}}}
    small["compacter"] = {"compacter": {"phm_dim": 2, "reduction_factor": 8}}
    module: Any = compose(method, "sft")(str(save_tiny("llama", tmp_path / "base")), **small.get(method, {}))
    module.configure_model()
    said = set(learning_rates(type(module)).values())
    raised = {16 * rate for rate in said} if method == "loraplus" else set()
    assert said | raised == {group["lr"] for group in module.parameter_groups()}


def test_what_is_chosen_where_nothing_is_said(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> str:
        with suppress(SystemExit):
            main(["fit", *JOB, *arguments, "--print_config"])
        return capsys.readouterr().out

    found = printed("--method", "qlora")
    assert "    lr: null  # 0.0002\n" in found
    assert "    dtype: null  # bfloat16\n" in found
    assert "    quantize: null  # nf4\n" in found
    assert "    optim: null  # paged_adamw_32bit on CUDA, else adamw\n" in found
    assert "    lr: null  # lora 0.0002, bitfit 0.001\n" in printed("--method", "lora+bitfit")
    assert "      init_lora_weights: pissa_niter_4\n" in printed(
        "--method", "pissa", "--model.lora.init_lora_weights", "pissa_niter_4"
    )
    assert "    lr: 0.01\n" in printed("--model.lr", "0.01")
