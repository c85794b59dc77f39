"""Vocabularies of Hugging Face folders, read as `transformers` reads them.

tokenizer.json is the tokenizer; other files add tokens, name the special ones, and hold the chat template and the stop
tokens. Only tokenizer.json's post-processor adds tokens around a text: `add_bos_token` and `add_eos_token` of
tokenizer_config.json have no effect.

There is one exception: the classes GPT2Tokenizer and Qwen2Tokenizer of transformers 5 split text by their own rules
even where tokenizer.json has others, such as single digits. The model was trained with those of the file, which apply
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from palladion.model.checkpoint_files import CheckpointError, JsonFile, check_regular, models_extra, shorten
from palladion.model.vocabulary import (
    SPACE,
    SPECIAL_NAMES,
    TOKEN_LIMIT,
    Vocabulary,
    byte_level_bytes,
    check_text,
    sentencepiece_bytes,
    tokenizer_errors,
)

NAMED_TOKENS: Final = (*SPECIAL_NAMES, "sep_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name special tokens."""

TOKEN_OPTIONS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Boolean options of an added token."""

REBUILT_CLASS: Final = "LlamaTokenizer"
"""Tokenizer class that splits text by its own rules instead of those of a SentencePiece tokenizer.json."""


def read_folder_vocabulary(path: Path) -> Vocabulary:
    """Reads the vocabulary of a Hugging Face folder.

    Raises:
      CheckpointError: a file is missing or damaged, or the kind of tokenizer cannot be decoded byte by byte.
    """
    with models_extra("reading a tokenizer"):
        import tokenizers

    file = path / "tokenizer.json"
    if not file.exists() and (path / "tokenizer.model").exists():
        raise CheckpointError(
            f"{path}: has tokenizer.model but no tokenizer.json; make one with transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    content = JsonFile(file).content
    with tokenizer_errors(CheckpointError, f"{file}: not a tokenizer", quiet=True):
        encoder = tokenizers.Tokenizer.from_file(str(file))
    encoder.no_truncation()
    encoder.no_padding()
    settings = _settings(path)
    config = JsonFile(path / "config.json", optional=True)
    scheme = _rebuilt_scheme(settings, config, content)
    if scheme is not None:
        encoder.normalizer = None
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    with tokenizer_errors(CheckpointError, f"{settings.path}: its tokens cannot be added"):
        _add_tokens(encoder, settings, path)
        special = _special_tokens(encoder, settings, config)
    stops = _stop_tokens(config) + _stop_tokens(JsonFile(path / "generation_config.json", optional=True))
    if "eos_token" in special:
        stops.append(special["eos_token"])
    pieces, drops_space = _token_bytes(content, encoder, file)
    vocabulary = Vocabulary(
        encoder=encoder,
        pieces=pieces,
        control=frozenset(i for i, token in encoder.get_added_tokens_decoder().items() if token.special),
        special=special,
        stop_tokens=frozenset(stops),
        bos_starts_chats=False,
        drops_leading_space=drops_space and scheme != "never",
        chat_template=_chat_template(path, settings),
    )
    vocabulary.probe(str(file))
    return vocabulary


def _settings(path: Path) -> JsonFile:
    """Returns tokenizer_config.json, merged with special_tokens_map.json of older folders."""
    settings = JsonFile(path / "tokenizer_config.json", optional=True)
    if "added_tokens_decoder" in settings.content:
        return settings
    older = JsonFile(path / "special_tokens_map.json", optional=True)
    return JsonFile(settings.path, content=settings.content | older.content)


def _rebuilt_scheme(settings: JsonFile, config: JsonFile, content: Mapping[str, Any]) -> str | None:
    """Returns where the class LlamaTokenizer adds a space; None for other classes and byte-level tokenizers.

    It adds a space only before a text, unless `legacy` is true; many a tokenizer.json adds one after each special token
    too. A Mistral model's tokenizer is never of this class, whatever its folder says.
    """
    named = settings.text("tokenizer_class") or ""
    is_mistral = config.text("model_type") == "mistral"
    if named.removesuffix("Fast") != REBUILT_CLASS or is_mistral or _is_byte_level(content):
        return None
    if settings.content.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.content.get("legacy", False) else "first"


def _add_tokens(encoder: Any, settings: JsonFile, path: Path) -> None:
    """Adds tokens that only other files name, in the same order as transformers."""
    from tokenizers import AddedToken

    listed = settings.section("added_tokens_decoder")
    label = f"{settings.path}: 'added_tokens_decoder'"
    numbered: dict[int, Any] = {}
    for key, entry in listed.content.items():
        if not key.isdecimal():
            raise CheckpointError(
                f"{label} has the key {shorten(key)}; its keys must be token ids; take the original file"
            )
        numbered[int(key)] = _added_token(entry, f"{label}[{shorten(key)}]", special=False)
    named = [_added_token(entry, key_label, special=True) for key_label, entry in _named_tokens(settings)]
    if "added_tokens_decoder" not in settings.content:
        older = JsonFile(path / "added_tokens.json", optional=True)
        special = {token.content for token in named}
        for text in older.content:
            (number,) = older.tokens(text)[:1] or [0]
            numbered[number] = AddedToken(text, special=text in special, normalized=text not in special)
    known = {repr(token) for token in encoder.get_added_tokens_decoder().values()}
    tokens = [token for _, token in sorted(numbered.items()) if repr(token) not in known]
    present = {token.content for token in [*encoder.get_added_tokens_decoder().values(), *tokens]}
    for token in named:
        if token.content not in present:
            present.add(token.content)
            tokens.append(token)
    encoder.add_tokens(tokens)


def _named_tokens(settings: JsonFile) -> Iterator[tuple[str, Any]]:
    """Yields every special token of the settings: its label for errors, and its text or description."""
    for key, entry in settings.content.items():
        if key in NAMED_TOKENS and entry is not None:
            yield f"{settings.path}: {key!r}", entry
    extra = settings.content.get("extra_special_tokens") or settings.content.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise CheckpointError(
            f"{settings.path}: 'extra_special_tokens' must be a list of tokens, got {shorten(extra)}; take the "
            "original file"
        )
    for entry in extra.values() if isinstance(extra, dict) else extra:
        yield f"{settings.path}: 'extra_special_tokens'", entry
    for key, entry in settings.content.items():
        if key.endswith("_token") and key not in NAMED_TOKENS and isinstance(entry, str):
            yield f"{settings.path}: {key!r}", entry


def _added_token(entry: Any, label: str, special: bool) -> Any:
    """Returns the AddedToken that an entry describes: its text, or an object with its text and options."""
    from tokenizers import AddedToken

    if isinstance(entry, str):
        return AddedToken(entry, special=special)
    text = entry.get("content") if isinstance(entry, dict) else None
    options = {name: entry[name] for name in TOKEN_OPTIONS if name in entry} if isinstance(entry, dict) else {}
    if not isinstance(text, str) or not all(isinstance(value, bool) for value in options.values()):
        raise CheckpointError(
            f"{label} must be a token: a string, or an object of 'content' and booleans; got {shorten(entry)}; take "
            "the original file"
        )
    return AddedToken(text, **({"special": special} | options | ({"special": True} if special else {})))


def _special_tokens(encoder: Any, settings: JsonFile, config: JsonFile) -> dict[str, int]:
    """Returns the ids of the special tokens that the settings name; BOS may come from config.json instead."""
    special: dict[str, int] = {}
    for name in SPECIAL_NAMES:
        entry = settings.content.get(name)
        text = entry["content"] if isinstance(entry, dict) else entry
        token = None if text is None else encoder.token_to_id(text)
        if token is not None:
            special[name] = token
    for token in _ids(config, "bos_token_id")[:1]:
        if encoder.id_to_token(token) is not None:
            special.setdefault("bos_token", token)
    return special


def _stop_tokens(file: JsonFile) -> list[int]:
    """Returns the tokens that end a generation."""
    return _ids(file, "eos_token_id")


def _ids(file: JsonFile, key: str) -> list[int]:
    """Returns the token ids under a key, checked against `TOKEN_LIMIT`."""
    ids = file.tokens(key)
    if wrong := [token for token in ids if token >= TOKEN_LIMIT]:
        raise CheckpointError(
            f"{file.path}: {key!r} is {wrong[0]}, which no vocabulary has: ids are below {TOKEN_LIMIT:,}; take the "
            "original file"
        )
    return ids


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    """Returns whether a tokenizer.json is of a byte-level tokenizer."""
    return "ByteLevel" in {step.get("type") for step in _decoder_steps(content)}


def _decoder_steps(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the steps of tokenizer.json's decoder."""
    decoder = content.get("decoder") or {}
    return decoder.get("decoders", [decoder])


def _token_bytes(content: Mapping[str, Any], encoder: Any, file: Path) -> tuple[list[bytes], bool]:
    """Returns the bytes into which tokenizer.json decodes each token, and whether it drops a text's leading space."""
    steps = _decoder_steps(content)
    kinds = {step.get("type") for step in steps}
    added = encoder.get_added_tokens_decoder().keys()
    vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary and vocabulary[last] >= TOKEN_LIMIT:
        raise CheckpointError(
            f"{file}: token {shorten(last)} has the id {vocabulary[last]}, which no vocabulary has: ids are below "
            f"{TOKEN_LIMIT:,}; take the original file"
        )
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if "ByteLevel" in kinds:
        for token, i in vocabulary.items():
            pieces[i] = byte_level_bytes(token, i in added)
        return pieces, False
    if not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise CheckpointError(
            f"{file}: decoder {' + '.join(sorted(map(str, kinds)))} is not supported; supported: ByteLevel, and "
            "SentencePiece's (Metaspace, or Replace with ByteFallback)"
        )
    for token, i in vocabulary.items():
        pieces[i] = sentencepiece_bytes(token, "ByteFallback" in kinds and i not in added)
    strips = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
    metaspace = any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return pieces, strips or metaspace


def _chat_template(path: Path, settings: JsonFile) -> str | None:
    """Returns the chat template: that of its own file, else the (default) one in tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.exists():
        check_regular(file)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: not readable as UTF-8 text ({error}); download it again") from error
    named = settings.content.get("chat_template")
    if not isinstance(named, list):
        template = settings.text("chat_template")
    else:
        entries = [JsonFile(settings.path, content=entry) for entry in named if isinstance(entry, dict)]
        template = next((entry.text("template") for entry in entries if entry.text("name") == "default"), None)
    try:
        return template if template is None else check_text(template, f"{settings.path}: 'chat_template'")
    except ValueError as error:
        raise CheckpointError(f"{error}; take the original file") from error
