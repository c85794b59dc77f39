"""The vocabulary of a tokenizer, independent of file formats; errors of the `tokenizers` package; argument checks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from palladion.model.checkpoint_files import CheckpointError, shorten

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Names of the special tokens that chat templates use."""

SPACE: Final = "\u2581"
"""The character that stands for a space in a SentencePiece vocabulary."""

TOKEN_LIMIT: Final = 1 << 24
"""Bound of token ids, sixty times the largest vocabulary in use: larger ids come from damaged files."""

PROBE: Final = "Hello,  w\u00f6rld 12\n\u65e5\U0001f642"
"""A text that is encoded at load, so that a tokenizer that cannot run is found there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A checkpoint's tokens.

    Attributes:
      encoder: a `tokenizers.Tokenizer`; its post-processor adds the tokens that the checkpoint puts around a text.
      pieces: bytes of each token.
      control: tokens without text, such as the end of a turn.
      special: ids of those of `SPECIAL_NAMES` that exist.
      stop_tokens: tokens that end a generation.
      bos_starts_chats: whether a chat prompt begins with the BOS token even if its template does not write it.
      drops_leading_space: whether encoding adds a space before a text, which decoding removes.
      chat_template: a Jinja template, or None.
    """

    encoder: Any
    pieces: Sequence[bytes]
    control: frozenset[int]
    special: Mapping[str, int]
    stop_tokens: frozenset[int]
    bos_starts_chats: bool
    drops_leading_space: bool
    chat_template: str | None

    def probe(self, source: str) -> None:
        """Encodes a short text as a check.

        Raises:
          CheckpointError: the encoder fails, or returns an id that is not a token's; `source` names the file.
        """
        with tokenizer_errors(CheckpointError, f"{source}: the tokenizer cannot encode", quiet=True):
            ids = self.encoder.encode(PROBE).ids
        if ids and max(ids) >= len(self.pieces):
            raise CheckpointError(
                f"{source}: the tokenizer puts token {max(ids)} around a text, but its last token is "
                f"{len(self.pieces) - 1}; take the original file"
            )


# -------------------------------------------------------------------------------------- errors of the Rust package

_STDERR_LOCK: Final = threading.Lock()
"""Held while file descriptor 2 is redirected."""


@contextlib.contextmanager
def tokenizer_errors(kind: type[ValueError], message: str, *, quiet: bool = False) -> Iterator[None]:
    """Wraps calls of the `tokenizers` package; any failure in them is raised as `kind`.

    Args:
      kind: class of the error.
      message: beginning of the message: what failed, and in which file.
      quiet: whether the trace of a Rust panic is kept off standard error. Everything that the process writes there
        meanwhile is lost, so use it for short calls only.
    """
    with _stderr_discarded() if quiet else contextlib.nullcontext():
        try:
            yield
        except CheckpointError:
            raise
        except BaseException as error:
            # A panic of the Rust code is raised as a class that cannot be imported and is not an Exception. Other
            # errors are plain Exceptions.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise kind(f"{message} ({shorten(str(error))[1:-1]}); download the checkpoint again") from error


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discards output to file descriptor 2, where Rust writes without Python's `sys.stderr`."""
    with _STDERR_LOCK:  # otherwise one thread would restore the redirection of another
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        try:
            saved = os.dup(2)
        except OSError:  # the process has no standard error
            yield
            return
        discarded = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(discarded, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(discarded)


# ------------------------------------------------------------------------------------------------- checks of arguments


def check_text(text: Any, label: str) -> str:
    """Returns `text` if it is a string of Unicode characters; `label` names it in an error.

    Raises:
      ValueError: it is not a string, or has lone surrogates, which stand for bytes that are not UTF-8.
    """
    if not isinstance(text, str):
        raise ValueError(f"{label}: got {_shown(text)}; accepted: a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label}: is not valid text: character {error.start} is {text[error.start]!r}, a lone surrogate, which "
            "stands for a byte that is not UTF-8; accepted: Unicode text, decoded from UTF-8"
        ) from error
    return text


def token_ids(values: Any, label: str) -> list[int]:
    """Returns token ids as a list of Python integers.

    Args:
      values: iterable of integers, such as a list, or a one-dimensional NumPy or JAX array.
      label: name of the argument, for errors.

    Raises:
      ValueError: `values` is not such an iterable, or one of them is not an integer.
    """
    given = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{label}: got {_shown(values)}; accepted: a list or one-dimensional array of token ids")
    return [check_integer(value, f"{label}[{index}]") for index, value in enumerate(given)]


def check_integer(value: Any, label: str) -> int:
    """Returns an integer of any library as a Python integer.

    Raises:
      ValueError: it is not an integer, as bools and floats are not; `label` names it.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{label}: got {_shown(value)}; accepted: an integer")


def _shown(value: Any) -> str:
    """Returns a value's type and the beginning of its repr, for an error."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---------------------------------------------------------------------------------------------- bytes of a single token


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """Returns the byte of each character in a byte-level vocabulary: visible bytes stand for themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_level_bytes(token: str, literal: bool) -> bytes:
    """Returns the bytes of a token of a byte-level vocabulary; a `literal` token's bytes are its name."""
    alphabet = _byte_alphabet()
    if literal or not all(character in alphabet for character in token):
        return token.encode()
    return bytes(alphabet[character] for character in token)


def sentencepiece_bytes(token: str, is_byte: bool) -> bytes:
    """Returns the bytes of a token of a SentencePiece vocabulary; with `is_byte`, "<0x41>" is the byte 0x41."""
    if is_byte and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
        return bytes.fromhex(match[1])
    return token.replace(SPACE, " ").encode()
