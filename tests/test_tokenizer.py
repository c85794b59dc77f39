"""Tokenizers: text survives the way through tokens, streams give whole characters, chats say what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import BOS, END, START, TRICKY, USER, byte_level_metadata, sentencepiece_metadata

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.gguf_vocabulary import PRE_TOKENIZERS
from palladion.model.locate import find_model
from palladion.model.tokenizer import Tokenizer
from palladion.model.vocabulary import SPACE

BYTE_LEVEL = Tokenizer.from_gguf(byte_level_metadata())
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())

# ------------------------------------------------------------------------------------------------- encoding, decoding


def test_byte_level_tokens() -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in BYTE_LEVEL.encode("hello world 12")] == ["hello", "Ġw", *"orld", "Ġ", "1", "2"]
    assert BYTE_LEVEL.encode("<|im_start|>h<|im_end|>") == [START, tokens.index("h"), END]


def test_sentencepiece_tokens() -> None:
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    ids = SENTENCEPIECE.encode("hello world<|im_end|>Z")
    expected = ["<s>", SPACE, "hello", f"{SPACE}world", "<|im_end|>", SPACE, "<0x5A>"]
    assert [tokens[i] for i in ids] == expected
    without_prefix = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert [tokens[i] for i in without_prefix.encode("hello")] == ["<s>", "hello"]
    assert without_prefix.decode(without_prefix.encode(" hello")) == " hello"


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), special=True) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, add_bos=False)) == text
    spaces = text.replace(SPACE, " ")  # that character and a space are the same to SentencePiece
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == spaces


def test_control_tokens_are_shown_on_request() -> None:
    ids = BYTE_LEVEL.encode("<|im_start|>hello<|im_end|>")
    assert BYTE_LEVEL.decode(ids) == "hello"
    assert BYTE_LEVEL.decode(ids, special=True) == "<|im_start|>hello<|im_end|>"


def test_user_defined_tokens_are_text() -> None:
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "two words"]
    types = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=types))
    assert tokenizer.encode("two words") == [len(tokens) - 1]
    assert tokenizer.decode([len(tokens) - 1]) == "two words"


def test_bos() -> None:
    h = BYTE_LEVEL.encode("h")
    assert len(h) == 1
    assert BYTE_LEVEL.encode("h", add_bos=True) == [BOS, *h]
    adding = Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe"))
    assert adding.encode("h") == [BOS, *h]
    assert adding.encode("<s>h") == [BOS, BOS, *h], "as by llama.cpp: the text may talk about the token"
    assert adding.encode("h", add_bos=False) == h
    stated = Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe", add_bos_token=False))
    assert stated.encode("h") == h
    with pytest.raises(ValueError, match="add_bos=True, but this vocabulary has no BOS token"):
        Tokenizer.from_gguf(byte_level_metadata(bos_token_id=None)).encode("h", add_bos=True)


def test_ids_outside_the_vocabulary() -> None:
    assert BYTE_LEVEL.decode([10**6, *BYTE_LEVEL.encode("h")]) == "h"
    with pytest.raises(ValueError, match="not negative, got -1"):
        BYTE_LEVEL.decode([-1])


@pytest.mark.parametrize("form", [list, tuple, iter, np.array, jnp.array, lambda ids: [*jnp.array(ids)], np.uint16])
def test_any_integers_are_tokens(form: Any) -> None:
    assert BYTE_LEVEL.decode(form(BYTE_LEVEL.encode("hello"))) == "hello"
    assert BYTE_LEVEL.stream().push(np.int64(BYTE_LEVEL.encode("h")[0])) == "h"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("hello", "got str 'hello'; accepted: a list or one-dimensional array of token ids"),
        (5, "got int 5"),
        (np.array(5), "one-dimensional array"),
        (None, "got NoneType"),
        ([1, 2.0], r"ids\[1\]: got float 2.0; accepted: an integer"),
        (np.array([[1]]), r"ids\[0\]: got list \[1\]; accepted: an integer"),
        (np.array([1.5]), r"ids\[0\]: got float 1.5"),
        ([True], r"ids\[0\]: got bool True"),
        (["a"], r"ids\[0\]: got str 'a'"),
    ],
)
def test_what_is_no_token(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^decode: .*{message}"):
        BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h\ud800", r"encode: text: is not valid text: character 1 is '\\ud800', a lone surrogate"),
        ("\udcff", "a lone surrogate, which stands for a byte that is not UTF-8"),
        (b"hello", "encode: text: got bytes b'hello'; accepted: a string"),
        (None, "encode: text: got NoneType None; accepted: a string"),
        ([1, 2], r"encode: text: got list \[1, 2\]; accepted: a string"),
    ],
)
def test_what_is_no_text(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(text)


# ------------------------------------------------------------------------------------------------------------- streams


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]), st.data())
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]), st.text(alphabet="aé€🙂 \u0301", max_size=12))
def test_valid_text_streams_without_replacement(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_characters_wait_until_they_are_whole() -> None:
    stream = BYTE_LEVEL.stream()
    pieces = [stream.push(token) for token in BYTE_LEVEL.encode("é🙂!")]
    assert pieces == ["", "é", "", "", "", "🙂", "!"]
    assert stream.push(BYTE_LEVEL.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_leading_space_goes_once() -> None:
    ids = SENTENCEPIECE.encode(" world", add_bos=False)
    assert SENTENCEPIECE.decode([BOS, *ids]) == " world"
    world = [sentencepiece_metadata()["tokenizer.ggml.tokens"].index(f"{SPACE}world")]
    assert SENTENCEPIECE.decode([BOS, *world, *world]) == "world world"
    stream = SENTENCEPIECE.stream(continuing=True)
    assert stream.push(world[0]) == " world"


# --------------------------------------------------------------------------------------------------------------- peers


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and no weights, which llama.cpp opens with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def assert_agrees_with_llama_cpp(path: Path, tokenizer: Tokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        for text in TRICKY:
            assert tokenizer.encode(text) == peer.tokenize(text.encode(), special=True), text
    finally:
        peer.close()


def smollm2_vocabulary() -> tuple[Path, dict[str, Any]]:
    try:
        path = find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    fields = gguf.GGUFReader(path).fields
    return path, {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.mark.peer
def test_smollm2_agrees_with_llama_cpp(tmp_path: Path) -> None:
    path, metadata = smollm2_vocabulary()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert_agrees_with_llama_cpp(path, tokenizer)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat([USER]) == prompt
    assert tokenizer.stop_tokens == (0, 2, 4)  # <|endoftext|>, <|im_end|> and <reponame>
    # The same vocabulary, cut short so that it is written quickly, under every way of cutting text.
    size = 1200
    tokens = metadata["tokenizer.ggml.tokens"][:size]
    merges = [m for m in metadata["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= {*tokens}]
    for pre in PRE_TOKENIZERS:
        cut = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"][:size],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 2,
        }
        assert_agrees_with_llama_cpp(write_vocabulary(tmp_path / f"{pre}.gguf", cut), Tokenizer.from_gguf(cut))


@pytest.mark.peer
def test_sentencepiece_agrees_with_llama_cpp(tmp_path: Path) -> None:
    for changes in ({}, {"add_space_prefix": False}, {"add_bos_token": False}):
        metadata = sentencepiece_metadata(**changes)
        path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
        assert_agrees_with_llama_cpp(path, Tokenizer.from_gguf(metadata))
