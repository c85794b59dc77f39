"""Text to tokens and back, with the vocabulary and the chat template that a checkpoint brings along."""

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
      bos: the token that starts a text, or None.
      stop_tokens: tokens that end a generation, ascending.
      chat_template: the checkpoint's Jinja template, or None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes what a checkpoint says about its tokens."""
        self.bos = vocabulary.special.get("bos_token")
        self.stop_tokens = tuple(sorted(vocabulary.stop_tokens))
        self.chat_template = vocabulary.chat_template
        self._vocabulary = vocabulary
        texts = {name: self._text_of(vocabulary.special.get(name)) for name in SPECIAL_NAMES}
        self._chat = None if self.chat_template is None else ChatTemplate(self.chat_template, texts)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Args:
          metadata: the file's metadata as plain Python values, by key; those under `tokenizer.` are used.
          source: the file's name, for messages.

        Raises:
          CheckpointError: the tokenizer is of an unsupported kind, or a part of it is missing or damaged.
        """
        return cls(read_gguf_vocabulary(metadata, source))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face folder; it gives the tokens that transformers gives.

        Args:
          path: a folder with tokenizer.json and, as far as they exist, tokenizer_config.json, chat_template.jinja,
            config.json and generation_config.json (where the stop tokens are).

        Raises:
          CheckpointError: tokenizer.json is missing, damaged, or of a kind that cannot be decoded byte by byte.
        """
        return cls(read_folder_vocabulary(Path(path)))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; a model's embedding may have more rows, which pad it."""
        return len(self._vocabulary.pieces)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Turns text into tokens; the names of special tokens in it become those tokens.

        Args:
          text: any text. What `render_chat` returns has its special tokens already.
          add_bos: whether the BOS token goes first; None leaves it to the checkpoint what goes before a text, and
            after it. A text that itself begins with the name of the BOS token then has two of them, as it has by
            transformers and llama.cpp.

        Raises:
          ValueError: `text` is no string, or not valid Unicode; or `add_bos` is True and the vocabulary has no BOS
            token.
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
        """Turns tokens into text.

        Args:
          ids: token ids, an array of them included; rows that pad the embedding beyond the vocabulary have no text.
          special: whether control tokens are written out, or left out.

        Returns:
          The text; bytes that form no character come out as U+FFFD.

        Raises:
          ValueError: `ids` are no integers, or one of them is negative.
        """
        stream = self.stream(special=special)
        return "".join([stream.push(token) for token in token_ids(ids, "decode: ids")]) + stream.flush()

    def stream(self, *, special: bool = False, continuing: bool = False) -> TextStream:
        """A decoder that takes tokens one by one and gives text as soon as it is complete.

        Args:
          special: whether control tokens are written out, or left out.
          continuing: whether the text continues another, so that a space before its first word stays.
        """
        drops_space = self._vocabulary.drops_leading_space and not continuing
        hidden = frozenset() if special else self._vocabulary.control
        return TextStream(self._vocabulary.pieces, hidden, drops_space)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> ChatText:
        """Writes a conversation as the model was trained to read it, with the checkpoint's own template.

        A conversation without a system message is rendered without one, also where the template would put one of its
        own in. The template runs in a sandbox that bounds its work: see `palladion.model.chat_sandbox`.

        Args:
          messages: dictionaries of "role" ("system", "user", "assistant") and "content", a string or a list of text
            parts; others of their keys are the template's business.
          add_generation_prompt: whether the text ends where the assistant's answer begins.

        Returns:
          The text, a string that `encode` takes as it is, without more special tokens.

        Raises:
          ValueError: `messages` are no conversation, the checkpoint has no chat template, or its template refuses the
            conversation.
        """
        if self._chat is None:
            raise ValueError(
                "render_chat: this checkpoint has no chat template, as base models have none; encode plain text, or "
                "take the instruction-tuned checkpoint"
            )
        return self._chat.render(messages, add_generation_prompt)

    def _text_of(self, token: int | None) -> str:
        """The text of a special token, "" where there is none."""
        return "" if token is None else self._vocabulary.pieces[token].decode("utf-8", errors="replace")


class TextStream:
    """Text from tokens as they come; the pieces joined are the text of all tokens. Made by `Tokenizer.stream`."""

    def __init__(self, pieces: Sequence[bytes], hidden: frozenset[int], drops_space: bool) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._drops_space = drops_space
        # Keeps an unfinished character's bytes until the rest comes; only bytes that cannot become one are replaced.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is complete now, often one word, "" within a character.

        Raises:
          ValueError: `token` is negative, or no integer.
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
        """Ends the text: U+FFFD for a character that was never finished, else ""."""
        return self._decoder.decode(b"", final=True)
