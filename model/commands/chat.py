"""Holds a conversation with a model; its KV cache is kept, so that each turn reads only what is new.

  palladion chat --system="You are brief."
  palladion chat --model=owner/name --temperature=0.7 --repetition-penalty=1.1
  printf 'Hello\nAnd again\n' | palladion chat

/clear begins anew, /exit or Ctrl-D ends. Ctrl-C cuts an answer short. Without a terminal, each line of standard input
is a message.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Final

from palladion.model.checkpoint import open_checkpoint
from palladion.model.commands import options
from palladion.model.commands.progress import Progress
from palladion.model.conversation import Conversation
from palladion.model.generation import RunOptions
from palladion.model.vocabulary import check_text

HELP: Final = "holds a conversation"

MAX_NEW_TOKENS: Final = 1024
"""Most tokens of an answer by default."""

PROMPT: Final = "> "
"""Text that a terminal shows before a message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    group = parser.add_argument_group("the conversation")
    group.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="first message; repeat it for the next ones"
    )
    group.add_argument("--system", metavar="TEXT", help="system message; by default there is none")
    group.add_argument("--interactive", action="store_true", help="changes nothing: a chat always is")
    options.add_model_arguments(parser)
    options.add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    for name, text in [("--system", arguments.system or ""), *(("--prompt", text) for text in arguments.prompt or ())]:
        check_text(text, name)
    max_new_tokens = MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": arguments.seed, "stop": arguments.stop}
    RunOptions(**settings, sampling=options.sampling(arguments))
    reader = open_checkpoint(arguments.model)
    # A checkpoint without a template is refused before its weights are read.
    reader.tokenizer().render_chat([{"role": "user", "content": "Hello"}])
    sampling = options.sampling(arguments, reader.tokenizer())
    with Progress() as progress:
        generator = options.load(arguments, reader, progress, 1)
        progress.working(options.compiling(arguments))
        generator.compile(1, sampling)
    conversation = Conversation(generator, arguments.system, sampling=sampling, **settings)
    for message in _messages(arguments.prompt or []):
        if message == "/clear":
            conversation.clear()
        elif message.strip():
            _answer(conversation, message)
    return 0


def _messages(first: list[str]) -> Iterator[str]:
    """Yields the messages that options give, then those that are typed, until the end of the conversation."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history
    for message in first:
        if terminal:
            print(PROMPT + message)
        yield message
    while True:
        try:
            message = input(PROMPT if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        if message.strip() in ("/exit", "/quit"):
            return
        yield message.strip()


def _answer(conversation: Conversation, message: str) -> None:
    """Shows the answer to a message as it comes."""
    try:
        for piece in conversation.send(check_text(message, "message")):
            print(piece, end="", flush=True)
    except ValueError as error:
        print(f"error: {error}; /clear begins anew", file=sys.stderr)
        return
    except KeyboardInterrupt:
        pass  # ends the answer, and not the conversation
    print("\n", flush=True)
