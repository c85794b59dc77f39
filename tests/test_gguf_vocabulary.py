"""Vocabularies of GGUF files: what ends a turn, how text is cut, and everything that may be wrong in the metadata."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    END,
    EOS,
    START,
    TRICKY,
    USER,
    byte_level_metadata,
    chat_tokenizer,
    sentencepiece_metadata,
)

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.gguf_vocabulary import END_OF_TURN, PRE_TOKENIZERS
from palladion.model.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer.from_gguf(byte_level_metadata())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=pre))
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False), special=True) == text


def test_special_tokens_that_are_no_token_do_not_exist() -> None:
    tokenizer = chat_tokenizer("[{{ bos_token }}{{ eos_token }}]", bos_token_id=2**32 - 1)
    assert tokenizer.bos is None
    assert tokenizer.render_chat([USER]) == "[</s>]"


def test_stop_tokens() -> None:
    assert "<|im_end|>" in END_OF_TURN
    assert BYTE_LEVEL.stop_tokens == (EOS, END)
    assert Tokenizer.from_gguf(byte_level_metadata(eot_token_id=START)).stop_tokens == (EOS, START, END)


# ------------------------------------------------------------------------------------------------ names in GGUF files


def with_token(name: str, kind: int, make: Any = byte_level_metadata) -> tuple[dict[str, Any], int]:
    """Metadata with one more token, and its id."""
    metadata = make()
    changes = {"tokens": [*metadata["tokenizer.ggml.tokens"], name]}
    changes["token_type"] = [*metadata["tokenizer.ggml.token_type"], kind]
    if "tokenizer.ggml.scores" in metadata:
        changes["scores"] = [*metadata["tokenizer.ggml.scores"], -100.0]
    return make(**changes), len(changes["tokens"]) - 1


@pytest.mark.parametrize("make", [byte_level_metadata, sentencepiece_metadata])
@pytest.mark.parametrize("kind", [1, 3, 4, 5], ids=["normal", "control", "user-defined", "unused"])
@pytest.mark.parametrize("name", ["<end_of_turn>", "<|EOT|>", "<|fim_pad|>"])
def test_ends_of_turns_are_known_by_name_whatever_their_type(name: str, kind: int, make: Any) -> None:
    metadata, token = with_token(name, kind, make)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert token in tokenizer.stop_tokens
    assert tokenizer.encode(f"h{name}", add_bos=False)[-1] == token
    assert tokenizer.decode([token]) == ""
    assert tokenizer.decode([token], special=True) == name


NAMES_OF_LLAMA_CPP = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>
    <turn|> <|tool_response> [e~[ <\uff5cend\u2581of\u2581sentence\uff5c>
    <|EOT|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
    <|file_sep|>
"""


@pytest.mark.parametrize("name", NAMES_OF_LLAMA_CPP.split())
def test_every_end_of_turn_that_llama_cpp_knows(name: str) -> None:
    metadata = byte_level_metadata()
    tokens, types = ([*metadata[f"tokenizer.ggml.{key}"]] for key in ("tokens", "token_type"))
    tokens[START], types[START] = name, 1
    tokens[EOS], tokens[END] = "<one>", "<another>"
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=types, eos_token_id=None))
    assert START in tokenizer.stop_tokens
    assert tokenizer.encode(f"h{name}h")[1] == START


@pytest.mark.parametrize("name", ["<|fim_prefix|>", "<SUF>", "<|channel|>"])
def test_other_names_are_one_token_and_end_nothing(name: str) -> None:
    metadata, token = with_token(name, 1)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode(f"h{name}")[1:] == [token]
    assert token not in tokenizer.stop_tokens
    assert tokenizer.decode([token]) == ("<|channel|>" if name == "<|channel|>" else "")


def test_names_that_end_less_beside_others() -> None:
    metadata = byte_level_metadata(eos_token_id=None)
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|end|>", "<|return|>", "<|call|>"]
    types = [*metadata["tokenizer.ggml.token_type"], 3, 3, 3]
    harmony = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=types, eos_token_id=None))
    end = len(tokens) - 3
    assert harmony.stop_tokens == (EOS, END, end + 1, end + 2), "there <|end|> ends a message, and a turn goes on"
    assert harmony.decode([end]) == "<|end|>"
    metadata, response = with_token("<|tool_response>", 3)
    del metadata["tokenizer.ggml.eos_token_id"]
    assert Tokenizer.from_gguf(metadata).stop_tokens == (END, response), "</s> is ordinary text there"


# --------------------------------------------------------------------------------------------------- damaged metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "'tokenizer.ggml.model' must be a string, got 3"),
        ({"tokens": 3}, "'tokenizer.ggml.tokens' must be a list, got 3"),
        ({"tokens": "abc"}, "'tokenizer.ggml.tokens' must be a list, got 'abc'"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' must hold a string for each token, has 1"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'tokenizer.ggml.tokens' has 'a' twice, as 0 and 2"),
        ({"token_type": 1}, "'tokenizer.ggml.token_type' must be a list, got 1"),
        ({"token_type": ["normal"] * 266}, "'tokenizer.ggml.token_type' must hold an integer .* has 'normal'"),
        ({"merges": "h e"}, "'tokenizer.ggml.merges' must be a list, got 'h e'"),
        ({"merges": [1]}, "'tokenizer.ggml.merges' must hold a string"),
        ({"merges": ["he"]}, "damaged vocabulary or merges"),
        ({"pre": 7}, "'tokenizer.ggml.pre' must be a string, got 7"),
        ({"pre": ["smollm"]}, r"'tokenizer.ggml.pre' must be a string, got \['smollm'\]"),
        ({"add_bos_token": "yes"}, "'tokenizer.ggml.add_bos_token' must be a boolean, got 'yes'"),
        ({"bos_token_id": "<s>"}, "'tokenizer.ggml.bos_token_id' must be an integer, got '<s>'"),
        ({"eos_token_id": [2]}, r"'tokenizer.ggml.eos_token_id' must be an integer, got \[2\]"),
        ({"eot_token_id": 2.0}, "'tokenizer.ggml.eot_token_id' must be an integer, got 2.0"),
    ],
)
def test_metadata_of_the_wrong_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}"):
        Tokenizer.from_gguf(byte_level_metadata(**changes), source="model.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": 1.0}, "'tokenizer.ggml.scores' must be a list"),
        ({"scores": ["x"] * 299}, "'tokenizer.ggml.scores' must hold a number"),
        ({"scores": [float("nan")] * 299}, "'tokenizer.ggml.scores' must hold a number .* has nan"),
        ({"scores": [0.0]}, "'tokenizer.ggml.scores' has 1 entries for 299 tokens"),
        ({"add_space_prefix": "no"}, "'tokenizer.ggml.add_space_prefix' must be a boolean"),
    ],
)
def test_sentencepiece_metadata_of_the_wrong_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(sentencepiece_metadata(**changes))


def test_a_template_of_the_wrong_type() -> None:
    with pytest.raises(CheckpointError, match=r"'tokenizer\.chat_template' must be a string, got 3"):
        Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize("token", [-1, 2**31, 2**32 - 1, 2**70])
def test_ids_that_are_no_token_are_none(token: int) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(bos_token_id=token, eos_token_id=token, eot_token_id=token))
    assert tokenizer.bos is None
    assert tokenizer.stop_tokens == (EOS, END), "by their names"


def test_several_tokens_may_be_empty() -> None:
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "", ""]
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=None))
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.decode([len(tokens) - 1]) == f"[EMPTY_{len(tokens) - 1}]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer model 'bert' .* supported: 'gpt2' .* and 'llama'"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing or empty"),
        ({"pre": "gpt-7"}, "pre-tokenizer 'gpt-7' is not supported; supported: default, gpt-2, smollm"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type' has 1 entries for 266 tokens"),
        ({"merges": ["h q q"]}, "damaged vocabulary or merges"),
    ],
)
def test_gguf_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}"):
        Tokenizer.from_gguf(byte_level_metadata(**changes), source="model.gguf")


def test_sentencepiece_needs_scores() -> None:
    with pytest.raises(CheckpointError, match=r"'tokenizer\.ggml\.scores' is missing"):
        Tokenizer.from_gguf(sentencepiece_metadata(scores=None))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([byte_level_metadata, sentencepiece_metadata]), st.data())
def test_any_metadata_is_a_tokenizer_or_an_error(make: Any, data: st.DataObject) -> None:
    metadata = make(add_bos_token=True, add_space_prefix=True, eot_token_id=END, chat_template=None)
    key = data.draw(st.sampled_from([*sorted(metadata), "tokenizer.chat_template"]))
    value = metadata.get(key)
    if isinstance(value, list) and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        metadata[key] = [*value[:place], data.draw(ANYTHING), *value[place + 1 :]]
    else:
        metadata[key] = data.draw(ANYTHING)
    try:
        tokenizer = Tokenizer.from_gguf(metadata)
    except CheckpointError:
        return
    tokenizer.decode(tokenizer.encode("<s>hello <|im_end|>\n\x00"), special=True)
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.stop_tokens)
