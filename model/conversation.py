"""A conversation: renders what was said with the chat template, and keeps the KV cache from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from palladion.model.generation import Generation, Run, RunOptions
from palladion.model.generator import Generator
from palladion.model.statistics import Statistics


class Conversation:
    """A chat with a generator.

    A turn prefills only what the KV cache does not hold: where the new prompt begins with the tokens of the one before,
    as with most chat templates, that is the new message alone.

    Args:
      generator: the model; other runs of it with the same options may come in between, and cost a longer prefill.
      system: the system message, or None.
      options: how answers are generated, as for `Generator.generate`: max_new_tokens, sampling, seed, stop, …

    Attributes:
      messages: what was said so far, as dictionaries of "role" and "content".
      last: the newest answer and its statistics, or None.
    """

    def __init__(self, generator: Generator, system: str | None = None, **options: Any) -> None:
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.last: tuple[Generation, Statistics] | None = None
        self._generator = generator
        self._options = RunOptions(**options, reuse_cache=True)

    def send(self, text: str) -> Iterator[str]:
        """Sends a message; yields the answer piece by piece.

        A reader that stops early keeps what was said until then as the answer.

        Raises:
          ValueError: the template refuses the message, or the conversation is too long for the KV cache; the message
            is then not part of it.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._generator.chat_prompt(self.messages)
            run = self._generator.run(prompt, self._options)
        except ValueError:
            self.messages.pop()
            raise
        return self._answer(run)

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _answer(self, run: Run) -> Iterator[str]:
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        for _, piece in run.pieces():
            answer["content"] += piece
            yield piece
        (generation,) = run.generations()
        self.last = (generation, run.statistics())
