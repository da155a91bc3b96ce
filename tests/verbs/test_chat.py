"""`lit-peft chat`: one-shot, from a pipe, beside its base."""

import io
from pathlib import Path

import pytest

from lit_peft import disabled
from lit_peft.verbs import chat
from lit_peft.zoo import compose
from tests.models import save_tiny
from tests.test_restore import built, checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A checkpoint, and what tuned and base model answer to 'Hello?'."""
    folder = tmp_path_factory.mktemp("chat")
    module = built(compose("lora", "sft"), save_tiny("llama", folder / "base"), lora={"alpha": 64})
    messages = [{"role": "user", "content": "Hello?"}]
    tuned = module.reply(messages, 8)
    with disabled(module):
        base = module.reply(messages, 8)
    assert tuned != base
    return checkpoint(module, folder / "a.ckpt"), {"tuned": tuned, "base": base}


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_one_shot(saved: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    path, wanted = saved
    chat.run(str(path), prompt="Hello?", max_new_tokens=8)
    assert capsys.readouterr().out.strip() == wanted["tuned"]


def test_beside_its_base(
    saved: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    path, wanted = saved
    chat.run(str(path), vs="base", prompt="Hello?", max_new_tokens=8)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["base", "a.ckpt"]
    middle = head.index("a.ckpt")
    assert squeezed("".join(line[:middle] for line in lines)) == squeezed(wanted["base"])
    assert squeezed("".join(line[middle:] for line in lines)) == squeezed(wanted["tuned"])


def test_pipe_and_commands(
    saved: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = saved
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n\nMore?\n/reset\n/warp 9\nHello?\n/exit\nnever\n"))
    chat.run(str(path), max_new_tokens=8)
    shown = capsys.readouterr().out
    first, after = shown.split("A new conversation.")
    assert first.startswith(wanted["tuned"])
    assert first.strip() != wanted["tuned"], "the second question has its answer too"
    assert "There is no command /warp" in after
    assert after.strip().endswith(wanted["tuned"]), "after /reset the same question has the same answer"


def test_history_is_kept_and_shortened(saved: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    module = chat._language_model(str(saved[0]), None, "cpu")
    seen: list[list[str]] = []

    def speak(history: list[dict[str, str]], streamer: object) -> str:
        seen.append([message["role"] for message in history])
        return "x" * 60

    talk = chat.Chat(Console(quiet=True), module, {"one": speak}, "Be brief.", max_new_tokens=8)
    for _ in range(5):
        talk.say("y" * 20)
    assert seen[1] == ["system", "user", "assistant", "user"]
    assert seen[-1][0] == "system"
    assert len(seen[-1]) < 10, "256 positions do not hold five turns"
    talk.reset()
    assert talk.histories == {"one": [{"role": "system", "content": "Be brief."}]}


def test_weights_trained_in_place_have_their_base_too(tmp_path: Path, saved: tuple[Path, dict[str, str]]) -> None:
    module = built(compose("freeze", "sft"), saved[0].parent / "base", freeze={"last_layers": 1})
    again = chat._language_model(str(checkpoint(module, tmp_path / "a.ckpt")), None, "cpu")
    base = chat._base_of(again, "a.ckpt", 8)
    assert base([{"role": "user", "content": "Hello?"}], None) == saved[1]["base"]


def test_mistakes(tmp_path: Path, saved: tuple[Path, dict[str, str]]) -> None:
    path, base = str(saved[0]), str(saved[0].parent / "base")
    bert = built(compose("lora", "classification"), save_tiny("bert", tmp_path / "bert", "base"))
    bert.save_adapter(tmp_path / "c")
    built(compose("full", "sft"), Path(base)).save_adapter(tmp_path / "f")
    for arguments, message in (
        ({"path": str(tmp_path / "c")}, "does not chat"),
        ({"path": base, "vs": "base"}, "a merged model"),
        ({"path": str(tmp_path / "f"), "vs": "base"}, "has no base to show: Full fine-tuning overwrites"),
        ({"path": path, "vs": path}, "have one name"),
        ({"path": path, "prompt": " "}, "prompt is empty"),
        ({"path": path, "max_new_tokens": 0}, "must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.run(**arguments)  # type: ignore[arg-type]
