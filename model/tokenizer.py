"""The tokenizer: converts text to tokens and back, with a checkpoint's own vocabulary and chat template."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palladion.model.chat_template import ChatTemplate, ChatText
from palladion.model.gguf_vocabulary import read_gguf_vocabulary
from palladion.model.huggingface_vocabulary import read_folder_vocabulary
from palladion.model.vocabulary import (
    SPECIAL_NAMES,
    Vocabulary,
    check_integer,
    check_text,
    token_ids,
    tokenizer_errors,
)


class Tokenizer:
    """A byte-level or SentencePiece BPE tokenizer; made by `from_gguf` or `from_folder`.

    Attributes:
      bos: id of the token that begins a text, or None.
      stop_tokens: ids of the tokens that end a generation, ascending.
      chat_template: the checkpoint's Jinja template, or None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Makes a tokenizer from a checkpoint's vocabulary."""
        self.bos = vocabulary.special.get("bos_token")
        self.stop_tokens = tuple(sorted(vocabulary.stop_tokens))
        self.chat_template = vocabulary.chat_template
        self._vocabulary = vocabulary
        texts = {name: self._special_text(vocabulary.special.get(name)) for name in SPECIAL_NAMES}
        self._chat = None if self.chat_template is None else ChatTemplate(self.chat_template, texts)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
        """Builds the tokenizer of a GGUF file.

        Args:
          metadata: the file's metadata as plain Python values, by key; keys under `tokenizer.` are used.
          source: name of the file, for errors.

        Raises:
          CheckpointError: the tokenizer is unsupported, or a part of it is missing or damaged.
        """
        return cls(read_gguf_vocabulary(metadata, source))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face folder; its tokens are those of transformers.

        Args:
          path: a folder with tokenizer.json and optionally tokenizer_config.json, chat_template.jinja, and config.json
            and generation_config.json for the stop tokens.

        Raises:
          CheckpointError: a file is missing or damaged, or the kind of tokenizer cannot be decoded byte by byte.
        """
        return cls(read_folder_vocabulary(Path(path)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's embedding may be padded to more rows."""
        return len(self._vocabulary.pieces)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Converts text to tokens; names of special tokens in the text become these tokens.

        Args:
          text: any text. A result of `render_chat` already contains its special tokens.
          add_bos: whether the BOS token comes first; None adds the tokens that the checkpoint puts around a text. A
            text that begins with the name of the BOS token then has two of them, as in transformers and llama.cpp.

        Raises:
          ValueError: `text` is not a string of valid Unicode, or `add_bos` is True and there is no BOS token.
        """
        check_text(text, "encode: text")
        if add_bos and self.bos is None:
            raise ValueError("encode: add_bos=True, but this vocabulary has no BOS token; leave add_bos out")
        whole = add_bos is None and not isinstance(text, ChatText)
        with tokenizer_errors(ValueError, "encode: the checkpoint's tokenizer fails on this text"):
            ids: list[int] = self._vocabulary.encoder.encode(str(text), add_special_tokens=whole).ids
        if add_bos is None and not whole:
            add_bos = self._vocabulary.bos_starts_chats and ids[:1] != [self.bos]
        return [self.bos, *ids] if add_bos and self.bos is not None else ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Converts tokens to text.

        Args:
          ids: list or array of token ids; ids beyond the vocabulary, which pad the embedding, have no text.
          special: whether the text includes control tokens.

        Returns:
          The text; invalid UTF-8 becomes U+FFFD.

        Raises:
          ValueError: one of `ids` is negative or not an integer.
        """
        stream = self.stream(special=special)
        return "".join([stream.push(token) for token in token_ids(ids, "decode: ids")]) + stream.flush()

    def stream(self, *, special: bool = False, continuing: bool = False) -> TextStream:
        """Returns a decoder that takes tokens one by one and returns text as soon as it is complete.

        Args:
          special: whether the text includes control tokens.
          continuing: whether the text continues another one, so that its leading space is kept.
        """
        drops_space = self._vocabulary.drops_leading_space and not continuing
        hidden = frozenset() if special else self._vocabulary.control
        return TextStream(self._vocabulary.pieces, hidden, drops_space)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> ChatText:
        """Renders a conversation with the checkpoint's own template, as the model was trained to read it.

        A conversation without a system message is rendered without one, even if the template has a default one. The
        template runs in a sandbox that bounds its work: see `palladion.model.chat_sandbox`.

        Args:
          messages: dictionaries of "role" ("system", "user", "assistant") and "content", a string or a list of text
            parts; other keys are passed to the template.
          add_generation_prompt: whether the text ends with the beginning of the assistant's turn.

        Returns:
          The text, to which `encode` adds no special tokens.

        Raises:
          ValueError: `messages` is not a conversation, or the chat template is missing, not valid, or refuses it.
        """
        if self._chat is None:
            raise ValueError(
                "render_chat: this checkpoint has no chat template, as base models have none; encode plain text, or "
                "take the instruction-tuned checkpoint"
            )
        return self._chat.render(messages, add_generation_prompt)

    def _special_text(self, token: int | None) -> str:
        """Returns the text of a special token, "" where it does not exist."""
        return "" if token is None else self._vocabulary.pieces[token].decode("utf-8", errors="replace")


class TextStream:
    """An incremental decoder, made by `Tokenizer.stream`; the pieces that it returns join to the text of all tokens."""

    def __init__(self, pieces: Sequence[bytes], hidden: frozenset[int], drops_space: bool) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._drops_space = drops_space
        # Keeps the bytes of an incomplete character until it is complete; invalid bytes are replaced.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes: often a word, "" within a character.

        Raises:
          ValueError: `token` is negative or not an integer.
        """
        token = check_integer(token, "decode: a token")
        if token < 0:
            raise ValueError(f"decode: token ids are not negative, got {token}")
        if token in self._hidden or token >= len(self._pieces):
            return ""
        piece = self._pieces[token]
        if self._drops_space and piece:
            self._drops_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)
