"""Vocabularies of GGUF files: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

As in llama.cpp, control tokens and the ends of a turn are recognized by their type, and by well-known names whatever
their type, because many converted files give such tokens the type of ordinary text.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from palladion.model.checkpoint_files import CheckpointError, models_extra, shorten
from palladion.model.vocabulary import (
    SPACE,
    SPECIAL_NAMES,
    Vocabulary,
    byte_level_bytes,
    sentencepiece_bytes,
    tokenizer_errors,
)


class TokenType(enum.IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class PreTokenizer(NamedTuple):
    """The rules by which text is split before byte pairs are merged.

    Attributes:
      patterns: regular expressions, applied in order, each to the pieces that the previous one made.
      ignore_merges: whether a piece that is in the vocabulary becomes one token without merges.
      add_bos: whether a prompt starts with the BOS token by default.
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
"""Pre-tokenizers by the names that `tokenizer.ggml.pre` uses."""

END_OF_TURN: Final = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|EOT|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "<end_of_turn>",
        "<turn|>",
        "<|tool_response>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    )
)
"""Tokens that always end a turn: a chat may use another one than the EOS token that the file names."""

END_OF_FILE: Final = frozenset(
    (
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    )
)
"""Tokens that separate files in models of code; they end a generation too."""

FILL_IN_MIDDLE: Final = frozenset(
    (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim\u2581begin\uff5c>",
        "<PRE>",
        "\u2581<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<SUF>",
        "\u2581<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim\u2581end\uff5c>",
        "<MID>",
        "\u2581<MID>",
        "<|code_middle|>",
        "<|middle|>",
    )
)
"""Control tokens that mark the parts of a file for a model of code that fills in its middle."""

SHOWN: Final = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
"""Tokens that are part of an answer's text, although files call them control tokens."""


def read_gguf_vocabulary(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Builds the vocabulary of a GGUF file.

    Args:
      metadata: the file's metadata as plain Python values, by key; keys under `tokenizer.` are used.
      source: name of the file, for errors.

    Raises:
      CheckpointError: the tokenizer is unsupported, or a part of it is missing or has the wrong type.
    """
    with models_extra("reading a tokenizer"):
        import tokenizers

    values = _Metadata(metadata, source)
    kind = values.text("model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{source}: tokenizer model {shorten(kind)} is not supported; supported: 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE)"
        )
    tokens = _tokens(values)
    types = values.items("token_type", int, len(tokens)) or [TokenType.NORMAL] * len(tokens)
    ends, control = _control_tokens(tokens, types)
    literal = control | {
        i for i, token in enumerate(tokens) if types[i] == TokenType.USER_DEFINED or token in FILL_IN_MIDDLE | SHOWN
    }
    with tokenizer_errors(CheckpointError, f"{source}: damaged vocabulary or merges"):
        if kind == "gpt2":
            encoder, adds_bos = _byte_level_encoder(values, tokens)
            pieces = [byte_level_bytes(token, i in literal) for i, token in enumerate(tokens)]
        else:
            encoder, adds_bos = _sentencepiece_encoder(values, tokens, types), True
            pieces = [sentencepiece_bytes(token, types[i] == TokenType.BYTE) for i, token in enumerate(tokens)]
        encoder.add_special_tokens(
            [tokenizers.AddedToken(tokens[i], special=True, normalized=False) for i in sorted(literal)]
        )
    keys = dict(zip(SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"), strict=True))
    special = {name: i for name, key in keys.items() if (i := values.token(key, len(tokens))) is not None}
    named = [values.token(key, len(tokens)) for key in ("eos", "eot", "eom")]
    bos = special.get("bos_token")
    adds_bos = values.flag("add_bos_token", adds_bos) and bos is not None
    if adds_bos:
        encoder.post_processor = tokenizers.processors.TemplateProcessing(
            single="BOS $A", special_tokens=[{"id": "BOS", "ids": [bos], "tokens": ["BOS"]}]
        )
    vocabulary = Vocabulary(
        encoder=encoder,
        pieces=pieces,
        control=control,
        special=special,
        stop_tokens=ends | {i for i in named if i is not None},
        bos_starts_chats=adds_bos,
        drops_leading_space=kind == "llama" and values.flag("add_space_prefix", True),
        chat_template=values.text("tokenizer.chat_template"),
    )
    vocabulary.probe(source)
    return vocabulary


KIND_NAMES: Final = {str: "a string", int: "an integer", float: "a number", bool: "a boolean", list: "a list"}
"""Names of types, for errors."""


class _Metadata:
    """The metadata under `tokenizer.ggml.`, whose types are checked when they are read."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self.source = source

    def text(self, key: str, default: str | None = None) -> str | None:
        """Returns a string, or the default; a key that begins with "tokenizer." is complete."""
        return self._value(key, str, default)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean, or the default."""
        return self._value(key, bool, default)

    def items(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """Returns a list of strings, integers or numbers, [] where it is absent; `count` is its required length."""
        items = self._value(key, list, [])
        accepted = (int, float) if kind is float else kind
        wrong = next((i for i in items if isinstance(i, bool) or not isinstance(i, accepted) or i != i), None)
        if wrong is not None:
            raise CheckpointError(
                f"{self.source}: 'tokenizer.ggml.{key}' must hold {KIND_NAMES[kind]} for each token, has "
                f"{shorten(wrong)}; convert the model again"
            )
        if items and count is not None and len(items) != count:
            raise CheckpointError(
                f"{self.source}: 'tokenizer.ggml.{key}' has {len(items)} entries for {count} tokens; convert the model "
                "again"
            )
        return items

    def token(self, key: str, count: int) -> int | None:
        """Returns the token id under "<key>_token_id"; None where it is absent, or not a token's id.

        Some files have -1, or its unsigned form, for a token that does not exist.
        """
        value = self._value(f"{key}_token_id", int, None)
        return value if value is not None and 0 <= value < count else None

    def _value(self, key: str, kind: type, default: Any) -> Any:
        key = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        value = self._metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.source}: {key!r} must be {KIND_NAMES[kind]}, got {shorten(value)}; convert the model again"
            )
        return value


def _tokens(values: _Metadata) -> list[str]:
    """Returns the names of all tokens, which are unique; an empty name becomes the one that llama.cpp uses."""
    tokens = values.items("tokens", str)
    if not tokens:
        raise CheckpointError(f"{values.source}: 'tokenizer.ggml.tokens' is missing or empty; convert the model again")
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(named)) != len(named):
        first = {token: i for i, token in reversed([*enumerate(named)])}
        again = next(i for i, token in enumerate(named) if first[token] != i)
        raise CheckpointError(
            f"{values.source}: 'tokenizer.ggml.tokens' has {shorten(named[again])} twice, as {first[named[again]]} and "
            f"{again}; convert the model again"
        )
    return named


def _control_tokens(tokens: Sequence[str], types: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the tokens whose names end a generation; and all control tokens, by type or name."""
    names = END_OF_TURN | END_OF_FILE
    present = names.intersection(tokens)
    if present >= {"<|return|>", "<|call|>", "<|end|>"} or (
        present >= {"<|flush|>", "<|end|>"} and present & {"<|call|>", "<|calls|>"}
    ):
        names -= {"<|end|>"}  # ends a message, and a turn may have several
    if "<|tool_response>" in present:
        names -= {"</s>"}  # ordinary text in these vocabularies
    ends = frozenset(i for i, token in enumerate(tokens) if token in names)
    shown = SHOWN | {"<|end|>"} - names
    by_type = (TokenType.CONTROL, TokenType.UNKNOWN)
    control = {
        i for i, token in enumerate(tokens) if token not in shown and (types[i] in by_type or token in FILL_IN_MIDDLE)
    }
    return ends, ends | control


def _byte_level_encoder(values: _Metadata, tokens: Sequence[str]) -> tuple[Any, bool]:
    """Returns the encoder of a byte-level BPE vocabulary, and whether prompts start with BOS by default."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    name = values.text("pre", "default")
    pre = PRE_TOKENIZERS.get(str(name))
    if pre is None:
        raise CheckpointError(
            f"{values.source}: pre-tokenizer {shorten(name)} is not supported; supported: {', '.join(PRE_TOKENIZERS)}. "
            "Load the model's Hugging Face folder instead, which has its own tokenizer"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in values.items("merges", str)]
    encoder = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre.ignore_merges)
    )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    return encoder, pre.add_bos


def _sentencepiece_encoder(values: _Metadata, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """Returns the encoder of a SentencePiece BPE vocabulary."""
    from tokenizers import Tokenizer, models, normalizers

    scores = values.items("scores", float, len(tokens))
    if not scores:
        raise CheckpointError(f"{values.source}: 'tokenizer.ggml.scores' is missing; convert the model again")
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == TokenType.UNKNOWN), None)
    encoder = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if values.flag("add_space_prefix", True) else []
    encoder.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    return encoder


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the merges that SentencePiece implies: any two tokens that form a third, the highest score first."""
    ids = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == TokenType.NORMAL}
    merges = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]
