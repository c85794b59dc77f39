"""What a tokenizer is made of, whatever files it comes from, and the boundary to the `tokenizers` package."""

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

from palladion.model.checkpoint_files import CheckpointError

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens that chat templates refer to."""

SPACE: Final = "\u2581"
"""What a SentencePiece vocabulary writes for a space."""

TOKEN_LIMIT: Final = 1 << 24
"""Token ids lie below this, sixty times the largest vocabulary in use: an id beyond it comes from a damaged file."""

PROBE: Final = "Hello,  w\u00f6rld 12\n\u65e5\U0001f642"
"""Encoded once while loading, so that a part of a tokenizer that cannot run is found there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Everything that a checkpoint says about its tokens.

    Attributes:
      encoder: a `tokenizers.Tokenizer`; its post-processor adds the tokens that the checkpoint puts around a text.
      pieces: the bytes that each token stands for.
      control: tokens that are no text, such as the end of a turn.
      special: ids of `SPECIAL_NAMES`, as far as the vocabulary has them.
      stop_tokens: tokens that end a generation.
      bos_starts_chats: whether a chat prompt begins with the BOS token also where its template does not write it.
      drops_leading_space: whether encoding puts a space before a text, which decoding takes off.
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
        """Encodes a short text.

        Raises:
          CheckpointError: the encoder cannot run, or gives what is no token; `source` names the file.
        """
        with tokenizer_errors(CheckpointError, f"{source}: the tokenizer cannot encode", quiet=True):
            ids = self.encoder.encode(PROBE).ids
        if ids and max(ids) >= len(self.pieces):
            raise CheckpointError(
                f"{source}: the tokenizer puts token {max(ids)} around a text, but its last token is "
                f"{len(self.pieces) - 1}; take the original file"
            )


# ------------------------------------------------------------------------------------- the boundary to the Rust package

_STDERR_LOCK: Final = threading.Lock()


@contextlib.contextmanager
def tokenizer_errors(kind: type[ValueError], message: str, *, quiet: bool = False) -> Iterator[None]:
    """Around calls of the `tokenizers` package: whatever goes wrong in it is raised as a `kind` with that message.

    Args:
      kind: the class of the error.
      message: what failed, and in which file.
      quiet: whether the trace that a Rust panic writes is kept off standard error: all that the process writes there
        meanwhile is lost, so only for short calls.
    """
    with _stderr_discarded() if quiet else contextlib.nullcontext():
        try:
            yield
        except CheckpointError:
            raise
        except BaseException as error:
            # A panic of the Rust code arrives as an exception of its own that cannot be imported, and that is no
            # Exception. Other errors are bare Exceptions.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise kind(f"{message} ({error}); download the checkpoint again") from error


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discards what is written to file descriptor 2, where Rust writes past Python's `sys.stderr`."""
    with _STDERR_LOCK:  # two threads would each restore what the other had redirected
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        try:
            saved = os.dup(2)
        except OSError:  # there is no standard error
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
    """`text` if it is a string of Unicode characters; `label` says in an error what it is.

    Raises:
      ValueError: it is something else, or has surrogates, which stand for bytes that are not UTF-8.
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
    """Token ids as a list of Python integers; `label` says in an error what they are.

    Args:
      values: an iterable of integers, such as a list, or a one-dimensional array of NumPy or JAX.
      label: the argument's name.

    Raises:
      ValueError: it is something else, or one of the values is no integer.
    """
    given = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{label}: got {_shown(values)}; accepted: a list or one-dimensional array of token ids")
    return [check_integer(value, f"{label}[{index}]") for index, value in enumerate(given)]


def check_integer(value: Any, label: str) -> int:
    """`value` as a Python integer, from one of any library; a bool or a float is none.

    Raises:
      ValueError: it is no integer; `label` says what it is.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{label}: got {_shown(value)}; accepted: an integer")


def _shown(value: Any) -> str:
    """A value in an error: its kind, and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ------------------------------------------------------------------------------------------ the bytes of a single token


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """The characters in which byte-level vocabularies write bytes: visible ones as they are, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_level_bytes(token: str, literal: bool) -> bytes:
    """The bytes of a byte-level vocabulary's token; a `literal` one stands for its own name."""
    alphabet = _byte_alphabet()
    if literal or not all(character in alphabet for character in token):
        return token.encode()
    return bytes(alphabet[character] for character in token)


def sentencepiece_bytes(token: str, is_byte: bool) -> bytes:
    """The bytes of a SentencePiece vocabulary's token; `is_byte` says that "<0x41>" is the byte 0x41."""
    if is_byte and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
        return bytes.fromhex(match[1])
    return token.replace(SPACE, " ").encode()
