"""Chat templates: render conversations to the text format that the model was trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from palladion.model.checkpoint_files import models_extra
from palladion.model.vocabulary import check_text

ACCEPTED: Final = (
    'accepted: dictionaries of "role" and "content", such as {"role": "user", "content": "Hello"}; the content is a '
    'string or a list of parts {"type": "text", "text": "Hello"}'
)
"""Description of a conversation, for errors."""


class ChatText(str):
    """A rendered conversation, which includes its special tokens: encoding adds none.

    Appending text, such as the beginning of the answer, returns a `ChatText` again.
    """

    __slots__ = ()

    def __add__(self, text: str) -> ChatText:
        return ChatText(super().__add__(text))


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
      source: the Jinja template.
      special: texts of the special tokens, by the names that templates use; "" for one that does not exist.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._source = source
        self._special = special

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> ChatText:
        """Renders a conversation; see `Tokenizer.render_chat`."""
        check_messages(messages)
        plain = self._render([*messages], add_generation_prompt)
        parts = [message["content"] for message in messages if isinstance(message.get("content"), list | tuple)]
        if any(str(content) in plain for content in parts):
            raise ValueError(
                "render_chat: the checkpoint's chat template takes no list of parts, it would write the list itself; "
                "give the content as one string"
            )
        if messages[0]["role"] == "system":
            return ChatText(plain)
        return ChatText(self._without_default(plain, messages, add_generation_prompt))

    def _without_default(self, plain: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Returns the conversation without the default system message that a template may add."""
        # A sentinel shows where the system message goes, and that only its own turn depends on it.
        sentinel = "palladion-system-message"
        system: list[Mapping[str, Any]] = [{"role": "system", "content": sentinel}]
        try:
            turn = self._render(system, False)
            full = self._render([*system, *messages], add_generation_prompt)
        except ValueError:
            return plain
        rest = full.removeprefix(turn)
        said = _text_of(messages[0].get("content")).strip()
        if sentinel not in turn or sentinel in rest or not rest or said not in rest or not plain.endswith(rest):
            return plain
        bos = self._special["bos_token"]
        return bos + rest if bos and plain.startswith(bos) and not rest.startswith(bos) else rest

    def _render(self, messages: list[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Runs the template."""
        render = self._renderer
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return render({**variables, "tools": None, "documents": None, **self._special})
        except Exception as error:  # A template is a program and can raise anything.
            raise ValueError(
                f"render_chat: the checkpoint's chat template refuses this conversation: {error}; roles given: "
                f"{[message['role'] for message in messages]}"
            ) from error

    @functools.cached_property
    def _renderer(self) -> Callable[[dict[str, Any]], str]:
        """The compiled template, as a function of its variables."""
        with models_extra("rendering a chat template"):
            from palladion.model.chat_sandbox import Environment, render
        try:
            return functools.partial(render, Environment().bounded(self._source))
        except Exception as error:  # Mostly jinja2.TemplateError; deep nesting exceeds limits of Python.
            raise ValueError(f"render_chat: the checkpoint's chat template is not valid: {error}") from error


def check_messages(messages: Any) -> None:
    """Raises ValueError unless `messages` is a conversation."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: got {messages!r:.60}; accepted: a list of at least one message. {ACCEPTED}")
    for index, message in enumerate(messages):
        label = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{label}: got {message!r:.60}; {ACCEPTED}")
        check_text(message.get("role"), f"{label}: 'role'")
        content = message.get("content")
        if isinstance(content, str):
            check_text(content, f"{label}: 'content'")
        elif isinstance(content, list | tuple) and content and all(map(_is_text_part, content)):
            check_text(_text_of(content), f"{label}: 'content'")
        elif content is not None or "tool_calls" not in message:  # a message that calls a tool needs no content
            raise ValueError(f"{label}: its content is {content!r:.60}; {ACCEPTED}")


def _is_text_part(part: Any) -> bool:
    """Returns whether a part of a message is text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text_of(content: Any) -> str:
    """Returns the text of a message's content; parts are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)
