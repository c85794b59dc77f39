"""Requests of `palladion generate`: prompts from options, standard input or JSON lines, and samples of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.model.chat_template import check_messages
from palladion.model.generation import check_seed
from palladion.model.tokenizer import Tokenizer
from palladion.model.vocabulary import check_text

FIELDS: Final = ("id", "messages", "prompt", "seed")
"""Fields of a line of JSON."""

ACCEPTED: Final = (
    'accepted: {"prompt": "Once"} or {"messages": [{"role": "user", "content": "Hello"}]}, with "seed" and "id" as you '
    "like"
)
"""Description of a line of JSON, for errors."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: the text that the model reads, special tokens of a chat included.
      shown: the text that the answer continues for a reader: "" for a chat.
      seed: seed of its random draws.
      label: the request's "id", or its number from 1.
      sample: number of this sample of the request, from 0.
    """

    prompt: str
    shown: str
    seed: int
    label: Any
    sample: int = 0


def read(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the requests that the options name, as the fields of a line of JSON, checked.

    Raises:
      ValueError: there is none, or one is not valid.
      OSError: a file cannot be read.
    """
    lines: list[dict[str, Any]] = [{"prompt": _text(text)} for text in arguments.prompt or ()]
    if arguments.input is not None:
        lines += _parse(arguments.input)
    if not lines:
        raise ValueError(
            'no prompt: give --prompt="…" (or -p), --prompt=- for standard input, or --input=FILE of JSON lines; '
            "`palladion chat` holds a conversation"
        )
    for number, line in enumerate(lines, 1):
        line["seed"] = check_seed(line.get("seed", arguments.seed), "seed")
        line.setdefault("id", number)
        if "prompt" in line:
            check_text(line["prompt"], "--prompt")
    if arguments.system is not None:
        check_text(arguments.system, "--system")
    return lines


def render(lines: Sequence[dict[str, Any]], arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[Request]:
    """Returns the requests with chats rendered, each as often as samples are asked for."""
    requests = []
    for line in lines:
        prompt = shown = line.get("prompt", "")
        if arguments.chat or "messages" in line:
            messages = line.get("messages", [{"role": "user", "content": prompt}])
            check_messages(messages)
            if arguments.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": arguments.system}, *messages]
            prompt, shown = tokenizer.render_chat(messages), ""
        for sample in range(arguments.samples):
            requests.append(Request(prompt, shown, check_seed(line["seed"] + sample), line["id"], sample))
    return requests


def batches(requests: Sequence[Request], size: int) -> Iterator[tuple[list[Request], int]]:
    """Yields requests in batches of one size, and how many of them count: the last batch is padded with copies."""
    for start in range(0, len(requests), size):
        batch = list(requests[start : start + size])
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


def _text(given: str) -> str:
    """Returns the text of a --prompt option: its own, or standard input without the newline at its end."""
    return sys.stdin.read().removesuffix("\n") if given == "-" else given


def _parse(name: str) -> list[dict[str, Any]]:
    """Reads lines of JSON from a file, or from standard input for "-"."""
    text: Iterable[str] = sys.stdin if name == "-" else Path(name).expanduser().read_text("utf-8").splitlines()
    parsed = []
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"{'standard input' if name == '-' else name}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); {ACCEPTED}") from error
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            raise ValueError(f"{where}: needs either a prompt or messages, got {line.strip():.60}; {ACCEPTED}")
        if unknown := sorted(fields.keys() - set(FIELDS)):
            raise ValueError(f"{where}: got {unknown[0]!r}; accepted: {', '.join(FIELDS)}")
        check_text(fields.get("prompt", ""), f"{where}: prompt")
        check_seed(fields.get("seed", 0), f"{where}: seed")
        parsed.append(fields)
    return parsed
