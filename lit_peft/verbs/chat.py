"""`lit-peft chat`: talk to a trained model in the terminal, alone or side by side with its base."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TextStreamer

from lit_peft.mixin import PEFT
from lit_peft.named import disabled
from lit_peft.quiet import quiet
from lit_peft.restore import load
from lit_peft.tasks import answers
from lit_peft.tasks.sft import SFT

Message = dict[str, str]
Speaker = Callable[[list[Message], Any], str]
HELP = "/reset forgets the conversation, /exit leaves"


def run(
    path: str,
    vs: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    prompt: str | None = None,
    backbone: str | None = None,
    device: str | None = None,
) -> None:
    """Talk to a trained model. Reads lines from the terminal or a pipe; answers are greedy.

    Args:
        path: a checkpoint, a run folder, an adapter folder, or a merged model's folder.
        vs: `base` to see the base model's answers beside; or the path of another trained model.
        system: a system message that opens the conversation.
        max_new_tokens: longest answer.
        prompt: answer this one message and leave.
        backbone: base model to use instead of the one that was noted.
        device: where to run; default: the GPU if there is one.

    Raises:
        ValueError: if it is no language model, or there is no base to compare with.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
    if prompt is not None and not prompt.strip():
        raise ValueError("The prompt is empty. Write a question, or leave --prompt out to chat.")
    quiet()
    console = Console(highlight=False)
    module = _language_model(path, backbone, device)
    speakers = {Path(path).name: _speaker(module, max_new_tokens)}
    if vs == "base":
        speakers = {"base": _base_of(module, path, max_new_tokens), **speakers}
    elif vs is not None:
        speakers = {Path(vs).name: _speaker(_language_model(vs, None, device), max_new_tokens), **speakers}
        if len(speakers) == 1:
            raise ValueError(f"{path} and {vs} have one name. Compare two different folders.")
    chat = Chat(console, module, speakers, system, max_new_tokens)
    if prompt is not None:
        chat.say(prompt)
        return
    if sys.stdin.isatty():
        console.print(f"[bold]{escape(path)}[/bold] on {module.backbone} ({module.device}). {HELP}.", style="dim")
    for line in _lines(console):
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            chat.reset()
            console.print("A new conversation.", style="dim")
        elif line.startswith("/"):
            console.print(f"There is no command {escape(line.split()[0])}: {HELP}.", style="dim")
        else:
            chat.say(line)


class Chat:
    """One conversation per speaker about the same user's messages.

    Args:
        console: where answers appear.
        module: knows tokenizer and context length.
        speakers: name -> who answers.
        system: opening system message.
        max_new_tokens: room that an answer needs.
    """

    def __init__(
        self, console: Console, module: SFT, speakers: dict[str, Speaker], system: str | None, max_new_tokens: int
    ) -> None:
        self.console = console
        self.module = module
        self.speakers = speakers
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.room = getattr(module.config, "max_position_embeddings", None) or sys.maxsize
        self.room -= max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.histories: dict[str, list[Message]] = {name: list(self.opening) for name in self.speakers}

    def say(self, text: str) -> None:
        """Let every speaker answer a message; one alone is shown while it speaks, several side by side."""
        for history in self.histories.values():
            history.append({"role": "user", "content": text})
            self._shorten(history)
        alone = len(self.speakers) == 1
        replies = {}
        for name, speak in self.speakers.items():
            streamer = (
                TextStreamer(self.module.tokenizer, skip_prompt=True, skip_special_tokens=True) if alone else None
            )
            try:
                replies[name] = speak(self.histories[name], streamer)
            except KeyboardInterrupt:  # stops this answer, not the chat
                self.console.print("\nStopped.", style="dim")
                for history in self.histories.values():
                    del history[-1:]
                return
        for name, reply in replies.items():
            self.histories[name].append({"role": "assistant", "content": reply})
        if not alone:
            table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, header_style="bold")
            for name in replies:
                table.add_column(name, ratio=1, overflow="fold")
            table.add_row(*(escape(reply) for reply in replies.values()))
            self.console.print(table)

    def _shorten(self, history: list[Message]) -> None:
        """Drop the oldest turns that do not fit into the model's context."""
        start, dropped = len(self.opening), 0
        while len(history) - start > 2 and len(answers.render(self.module, history)) > self.room:
            del history[start : start + 2]
            dropped += 2
        if dropped:
            self.console.print(f"The context is full: the oldest {dropped} messages were dropped.", style="dim")


def _language_model(path: str, backbone: str | None, device: str | None) -> SFT:
    module = load(path, backbone=backbone, device=device)
    if not isinstance(module, SFT):
        raise ValueError(f"{path} holds {type(module).__name__}, which does not chat. Use lit-peft predict for it.")
    return module


def _speaker(module: SFT, max_new_tokens: int) -> Speaker:
    return lambda history, streamer: module.reply(history, max_new_tokens, streamer)


def _base_of(module: SFT, path: str, max_new_tokens: int) -> Speaker:
    if not isinstance(module, PEFT):
        raise ValueError(f"{path} is a merged model, so its base is not in it. Give --vs the path of another model.")
    try:
        with disabled(module):
            pass
    except TypeError as reason:
        raise ValueError(f"{path} has no base to show: {reason} Or give --vs the base's own name.") from reason

    def speak(history: list[Message], streamer: Any) -> str:
        with disabled(module):
            return module.reply(history, max_new_tokens, streamer)

    return speak


def _lines(console: Console) -> Iterator[str]:
    """Yield what the user types, or the lines of a pipe, without empty ones."""
    while True:
        try:
            line = console.input("[bold cyan]> [/]") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip()
