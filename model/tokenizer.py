"""Text to tokens and back, with the vocabulary and the chat template that a checkpoint brings along."""

from __future__ import annotations

import codecs
import datetime
import enum
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from palladion.model.checkpoint_files import CheckpointError, JsonFile, models_extra

# ------------------------------------------------------------------------------------------------ vocabularies in GGUF


class TokenType(enum.IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class PreTokenizer(NamedTuple):
    """How text is cut before byte pairs are merged, by the names that `tokenizer.ggml.pre` uses.

    Attributes:
      patterns: regular expressions, each cutting the pieces that those before it left.
      ignore_merges: whether a piece that is itself in the vocabulary is taken whole.
      add_bos: whether a prompt starts with the BOS token where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3: Final = PreTokenizer((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: Final = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((GPT2_PATTERN,)),
    "smollm": PreTokenizer((r"\p{N}", GPT2_PATTERN)),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": PreTokenizer((LLAMA3_PATTERN.replace("{1,3}", ""),)),
}

END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
"""Control tokens that end a turn wherever they occur: files name one such token as EOS, a chat may use another."""

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens that chat templates refer to."""

SPACE: Final = "\u2581"
"""What a SentencePiece vocabulary writes for a space."""

# ----------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """A byte-level or SentencePiece BPE tokenizer; made by `from_gguf` or `from_folder`.

    Attributes:
      bos: the token that starts a text, or None.
      stop_tokens: tokens that end a generation, ascending.
      chat_template: the checkpoint's Jinja template, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        pieces: Sequence[bytes],
        control: frozenset[int],
        special: Mapping[str, int | None],
        stop_tokens: Iterable[int],
        adds_bos: bool,
        drops_leading_space: bool,
        chat_template: str | None,
    ) -> None:
        """Puts the parts together.

        Args:
          backend: a `tokenizers.Tokenizer` that encodes.
          pieces: the bytes that each token stands for.
          control: tokens that are no text, such as the end of a turn.
          special: ids of `SPECIAL_NAMES`; None, and what is no token at all, says that there is none.
          stop_tokens: tokens that end a generation.
          adds_bos: whether a prompt starts with the BOS token unless asked otherwise.
          drops_leading_space: whether encoding puts a space before a text, which decoding takes off.
          chat_template: a Jinja template, or None.
        """
        # Some files write -1 or its unsigned form for a token that they do not have.
        self._special = {name: i for name, i in special.items() if i is not None and 0 <= i < len(pieces)}
        self.bos = self._special.get("bos_token")
        self.stop_tokens = tuple(sorted(set(stop_tokens)))
        self.chat_template = chat_template
        self._backend = backend
        self._pieces = pieces
        self._control = control
        self._adds_bos = adds_bos
        self._drops_leading_space = drops_leading_space

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Args:
          metadata: the file's metadata as plain Python values, by key; those under `tokenizer.` are used.
          source: the file's name, for messages.

        Raises:
          CheckpointError: the tokenizer is of an unsupported kind, or a part of it is missing.
        """
        with models_extra("reading a tokenizer"):
            import tokenizers

        kind, tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
        if kind not in ("gpt2", "llama") or not tokens:
            raise CheckpointError(
                f"{source}: tokenizer model {kind!r} with {len(tokens or ())} tokens is not supported; supported: "
                "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
            )
        types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise CheckpointError(f"{source}: {len(types)} token types for {len(tokens)} tokens; download it again")
        control = frozenset(i for i, t in enumerate(types) if t in (TokenType.CONTROL, TokenType.UNKNOWN))
        literal = control | {i for i, t in enumerate(types) if t == TokenType.USER_DEFINED}
        if kind == "gpt2":
            backend, adds_bos = _byte_level_backend(metadata, tokens, source)
            pieces = [_byte_level_bytes(token, i in literal) for i, token in enumerate(tokens)]
            drops_space = False
        else:
            backend, adds_bos = _sentencepiece_backend(metadata, tokens, types, source)
            pieces = [_sentencepiece_bytes(token, t == TokenType.BYTE) for token, t in zip(tokens, types, strict=True)]
            drops_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend.add_special_tokens(
            [tokenizers.AddedToken(tokens[i], special=True, normalized=False) for i in sorted(literal)]
        )
        keys = ("bos", "eos", "unknown", "padding")
        special = {
            name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in zip(SPECIAL_NAMES, keys, strict=True)
        }
        named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        stops = [i for i in named if i is not None] + [i for i in control if tokens[i] in END_OF_TURN]
        return cls(
            backend,
            pieces=pieces,
            control=control,
            special=special,
            stop_tokens=stops,
            adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
            drops_leading_space=drops_space,
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face folder.

        Args:
          path: a folder with tokenizer.json and, as far as they exist, tokenizer_config.json, chat_template.jinja,
            config.json and generation_config.json (where the stop tokens are).

        Raises:
          CheckpointError: tokenizer.json is missing, damaged, or of a kind that cannot be decoded byte by byte.
        """
        with models_extra("reading a tokenizer"):
            import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.exists() and (path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{path}: has tokenizer.model but no tokenizer.json; make one with transformers' "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        content = JsonFile(file).content
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The package raises bare Exceptions.
            raise CheckpointError(f"{file}: not a tokenizer ({error}); download it again") from error
        backend.no_truncation()
        backend.no_padding()
        settings = JsonFile(path / "tokenizer_config.json", optional=True)
        special: dict[str, int | None] = {}
        for name in SPECIAL_NAMES:
            # A token is written as its text, or as an object that holds the text.
            is_object = isinstance(settings.content.get(name), dict)
            text = settings.section(name).text("content") if is_object else settings.text(name)
            special[name] = backend.token_to_id(text) if text else None
        config = JsonFile(path / "config.json", optional=True)
        generation = JsonFile(path / "generation_config.json", optional=True)
        if special["bos_token"] is None:
            special["bos_token"] = next(iter(config.tokens("bos_token_id")), None)
        stops = config.tokens("eos_token_id") + generation.tokens("eos_token_id")
        if special["eos_token"] is not None:
            stops.append(special["eos_token"])
        added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
        control = frozenset(i for i, entry in added.items() if entry["special"])
        pieces, drops_space = _decoding_of(content, backend, frozenset(added), file)
        first = backend.encode("").ids[:1]
        return cls(
            backend,
            pieces=pieces,
            control=control,
            special=special,
            stop_tokens=stops,
            adds_bos=bool(settings.content.get("add_bos_token", first == [special["bos_token"]])),
            drops_leading_space=drops_space,
            chat_template=_folder_template(path, settings),
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; a model's embedding may have more rows, which pad it."""
        return len(self._pieces)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Turns text into tokens; the names of special tokens in it become those tokens.

        Args:
          text: any text.
          add_bos: whether the BOS token goes first; None leaves it to the checkpoint, and never makes it two.

        Raises:
          ValueError: `add_bos` is True and the vocabulary has no BOS token.
        """
        if add_bos and self.bos is None:
            raise ValueError("encode: add_bos=True, but this vocabulary has no BOS token; leave add_bos out")
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos is None:
            add_bos = self._adds_bos and ids[:1] != [self.bos]
        return [self.bos, *ids] if add_bos and self.bos is not None else ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Turns tokens into text.

        Args:
          ids: token ids; rows that pad the embedding beyond the vocabulary have no text.
          special: whether control tokens are written out, or left out.

        Returns:
          The text; bytes that form no character come out as U+FFFD.
        """
        stream = self.stream(special=special)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def stream(self, *, special: bool = False, continuing: bool = False) -> TextStream:
        """A decoder that takes tokens one by one and gives text as soon as it is complete.

        Args:
          special: whether control tokens are written out, or left out.
          continuing: whether the text continues another, so that a space before its first word stays.
        """
        drops_space = self._drops_leading_space and not continuing
        return TextStream(self._pieces, frozenset() if special else self._control, drops_space)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation as the model was trained to read it, with the checkpoint's own template.

        A conversation without a system message is rendered without one, also where the template would put one of its
        own in. `encode` the result as it is.

        Args:
          messages: dictionaries of "role" ("system", "user", "assistant") and "content".
          add_generation_prompt: whether the text ends where the assistant's answer begins.

        Raises:
          ValueError: the checkpoint has no chat template, or its template refuses the conversation.
        """
        plain = self._render([*messages], add_generation_prompt)
        if not messages or messages[0].get("role") == "system":
            return plain
        # A sentinel shows where a system message goes, and that nothing but its own turn depends on it.
        sentinel = "palladion-system-message"
        system: list[Mapping[str, str]] = [{"role": "system", "content": sentinel}]
        try:
            turn = self._render(system, False)
            full = self._render([*system, *messages], add_generation_prompt)
        except ValueError:
            return plain
        rest = full.removeprefix(turn)
        said = str(messages[0].get("content", "")).strip()
        if sentinel not in turn or sentinel in rest or not rest or said not in rest or not plain.endswith(rest):
            return plain
        bos = self._text_of("bos_token")
        return bos + rest if bos and plain.startswith(bos) and not rest.startswith(bos) else rest

    def _render(self, messages: list[Mapping[str, str]], add_generation_prompt: bool) -> str:
        template = self._template
        try:
            text: str = template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: self._text_of(name) for name in SPECIAL_NAMES},
            )
        except Exception as error:  # A template is a program, it can fail in any way.
            raise ValueError(
                f"render_chat: the checkpoint's chat template refuses this conversation: {error}; roles given: "
                f"{[message.get('role') for message in messages]}"
            ) from error
        return text

    @functools.cached_property
    def _template(self) -> Any:
        if self.chat_template is None:
            raise ValueError(
                "render_chat: this checkpoint has no chat template, as base models have none; encode plain text, or "
                "take the instruction-tuned checkpoint"
            )
        with models_extra("rendering a chat template"):
            import jinja2.sandbox

        # A template comes with a download and is a program: sandboxed, it can only make text.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"render_chat: the checkpoint's chat template is not valid: {error}") from error

    def _text_of(self, name: str) -> str:
        """The text of a special token, "" where there is none."""
        token = self._special.get(name)
        return "" if token is None else self._pieces[token].decode("utf-8", errors="replace")


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
          ValueError: `token` is negative.
        """
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


# ------------------------------------------------------------------------------------------- how vocabularies are built


def _byte_level_backend(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> tuple[Any, bool]:
    """The encoder of a byte-level BPE vocabulary, and whether its prompts start with BOS by default."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise CheckpointError(
            f"{source}: pre-tokenizer {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}. "
            "The model's Hugging Face folder brings its own tokenizer"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # The package raises bare Exceptions.
        raise CheckpointError(f"{source}: damaged vocabulary or merges ({error}); download it again") from error
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    return backend, pre.add_bos


def _sentencepiece_backend(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], source: str
) -> tuple[Any, bool]:
    """The encoder of a SentencePiece BPE vocabulary, and whether its prompts start with BOS by default."""
    from tokenizers import Tokenizer, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores") or ()
    if len(scores) != len(tokens):
        raise CheckpointError(f"{source}: {len(scores)} scores for {len(tokens)} tokens; convert the model again")
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == TokenType.UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    return backend, True


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece leaves implicit: any two tokens that make a third, the best third first."""
    ids = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == TokenType.NORMAL}
    merges = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]


@functools.cache
def _byte_alphabet() -> Mapping[str, int]:
    """The characters in which byte-level vocabularies write bytes: visible ones as they are, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(token: str, literal: bool) -> bytes:
    alphabet = _byte_alphabet()
    if literal or not all(character in alphabet for character in token):
        return token.encode()
    return bytes(alphabet[character] for character in token)


def _sentencepiece_bytes(token: str, is_byte: bool) -> bytes:
    if is_byte and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
        return bytes.fromhex(match[1])
    return token.replace(SPACE, " ").encode()


def _decoding_of(
    content: Mapping[str, Any], backend: Any, added: frozenset[int], file: Path
) -> tuple[list[bytes], bool]:
    """What tokenizer.json's decoder makes of each token, and whether it drops the space that a text starts with."""
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if "ByteLevel" in kinds:
        for token, i in vocabulary.items():
            pieces[i] = _byte_level_bytes(token, i in added)
        return pieces, False
    if not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise CheckpointError(
            f"{file}: decoder {' + '.join(sorted(map(str, kinds)))} is not supported; supported: ByteLevel, and "
            "SentencePiece's (Metaspace, or Replace with ByteFallback)"
        )
    for token, i in vocabulary.items():
        pieces[i] = _sentencepiece_bytes(token, "ByteFallback" in kinds and i not in added)
    strips = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
    metaspace = any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return pieces, strips or metaspace


def _folder_template(path: Path, settings: JsonFile) -> str | None:
    """The chat template: its own file if there is one, else the one in tokenizer_config.json, by name if several."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    named = settings.content.get("chat_template")
    if not isinstance(named, list):
        return settings.text("chat_template")
    entries = [JsonFile(settings.path, content=entry) for entry in named if isinstance(entry, dict)]
    return next((entry.text("template") for entry in entries if entry.text("name") == "default"), None)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter of that name without Jinja's escaping for HTML: templates write JSON for a model to read."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
