"""Damaged metadata of either format: loading is one short CheckpointError, or gives a model that can run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoints import (
    EOS,
    HEAD_DIM,
    TOKENS,
    VOCAB,
    Type,
    encode,
    gguf_file,
    gguf_type,
    hugging_face_folder,
    hugging_face_names,
    random_weights,
    write_gguf,
)

from palladion.model.checkpoint import CheckpointError, load_checkpoint
from palladion.model.generator import Generator
from palladion.model.rotary import HIGHEST_FREQUENCY

LONGEST_MESSAGE = 700
"""Characters, a path of pytest's included."""

INTEGERS = (-1, 0, 1, 2**30, 2**31, 2**32 - 1, 2**63)
REALS = (0.5, -2.5, 1e-300, 1e300, math.inf, math.nan)
OTHERS = ("", "8", "false", "x" * 10_000, True, False)
LISTS = ([1, 2], [16, 16], [0.5], ["a"], ["a", "b"], [[1], [2]], [True])


def loads_or_says_why(path: Path, damage: str) -> bool:
    """Returns whether it loads; then the model generates and the tokenizer encodes, else an error names the file."""
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        assert path.name in str(error), damage  # noqa: PT017  # either ending is right
        assert len(str(error)) < LONGEST_MESSAGE, damage  # noqa: PT017
        return False
    except Exception as error:
        raise AssertionError(damage) from error
    config = Generator(checkpoint).config
    assert isinstance(checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("ab 1\U0001f642")), str), damage
    assert all(0 <= token < 2**31 for token in config.stop_tokens), damage
    assert config.sliding_window is None or 0 < config.sliding_window < 2**30, damage
    frequencies = np.asarray(checkpoint.parameters.inverse_frequencies)
    assert np.isfinite(frequencies).all(), damage
    assert 0 < frequencies.max() <= HIGHEST_FREQUENCY, damage
    return True


# ---------------------------------------------------------------------------------------------------------------- GGUF

GGUF_KEYS = (
    "general.architecture",
    "general.name",
    "split.count",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "expert_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "attention.causal",
    "logit_scale",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
)
SENTENCEPIECE = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)]}
ENTRIES = (-1, 0, 1, 2, 6, 7, 2**31, 2**63, 0.5, math.nan, -math.inf, "", "a", "a b", "x" * 10_000, True, [1], ["a"])
"""Entries of a list with as many as there are tokens."""


@pytest.mark.parametrize("base", [{}, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_damaged_gguf_vocabulary(tmp_path: Path, base: dict[str, Any]) -> None:
    """Lists of the right length with wrong entries, all of them or one."""
    tensors = encode(random_weights(), lambda _: Type.F32)
    path = tmp_path / "model.gguf"
    assert loads_or_says_why(write_gguf(path, tensors, base), "undamaged")
    right = {
        "tokens": TOKENS,
        "token_type": [1] * VOCAB,
        "scores": [-float(i) for i in range(VOCAB)],
        "merges": ["a b"] * VOCAB,
    }
    loaded = {}
    for key, entries in right.items():
        for entry in ENTRIES:
            damaged = [[entry] * VOCAB]
            if gguf_type(entry) == gguf_type(entries[0]):  # a list in a file has one type
                damaged += [[*entries[:-1], entry], [entry, *entries[1:]]]
            for place, value in enumerate(damaged):
                write_gguf(path, tensors, base | {f"tokenizer.ggml.{key}": value})
                loaded[key, repr(entry), place] = loads_or_says_why(path, f"{key}: {entry!r:.50}, {place}")
    assert loaded["tokens", "''", 1], "an empty token has a name of its own"
    assert not loaded["tokens", "'a'", 0]
    assert not loaded["token_type", "'a'", 0]
    assert loaded["scores", "nan", 1] == (base == {}), "scores count for SentencePiece only"


def test_damaged_gguf_metadata(tmp_path: Path) -> None:
    tensors = encode(random_weights(), lambda _: Type.F32)
    path = tmp_path / "model.gguf"
    loaded = {
        (key, repr(value)): loads_or_says_why(write_gguf(path, tensors, {key: value}), f"{key}: {value!r:.50}")
        for key in GGUF_KEYS
        for value in (*INTEGERS, *REALS, *OTHERS, *LISTS)
    }
    assert loaded["general.name", "[1, 2]"]
    assert loaded["attention.sliding_window", str(2**32 - 1)]
    assert loaded["tokenizer.ggml.eot_token_id", "-1"]
    assert not loaded["tokenizer.ggml.eot_token_id", "0.5"]
    assert not loaded["tokenizer.ggml.add_bos_token", "1"]
    assert not loaded["tokenizer.chat_template", "[1, 2]"]
    assert not loaded["split.count", "'8'"]
    assert not loaded["rope.scaling.factor", "1e-300"]
    assert not loaded["rope.freq_base", "1e+300"]


def test_gguf_tokens_that_there_are_not(tmp_path: Path) -> None:
    """Files write -1 or its unsigned form for a token that they do not have."""
    for token in (-1, VOCAB, 2**31, 2**63, 2**32 - 1):
        metadata = {f"tokenizer.ggml.{name}_token_id": token for name in ("eos", "eot", "bos")}
        checkpoint = load_checkpoint(gguf_file(tmp_path, **metadata))
        assert set(checkpoint.config.stop_tokens) <= {EOS}
        assert checkpoint.tokenizer.bos is None
    Generator(checkpoint).generate("ab", max_new_tokens=1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_length": 1}, r"'llama\.context_length' must be an integer of at least 2, got 1"),
        (
            {
                "tokenizer.ggml.tokens": [*TOKENS, *(f"token {i}" for i in range(VOCAB))],
                "tokenizer.ggml.token_type": [1] * 2 * VOCAB,
            },
            rf"'token_embd\.weight' has shape \[{VOCAB}, .* asks for \[{2 * VOCAB}, ",
        ),
        ({"split.count": [2]}, r"'split\.count' must be an integer of at least 0, got \[2\]"),
        ({"block_count": 2**31}, r"'llama\.block_count' must be a positive integer below 2\^31, got 2147483648"),
        ({"attention.scale": 0.5}, r"'llama\.attention\.scale' is 0\.5, which is not supported; supported: 0"),
        ({"rope.scaling.attn_factor": -2.0}, r"attn_factor' must be a positive number, got -2\.0"),
        ({"attention.causal": False}, "causal' is False, which is not supported; supported: True"),
        ({"rope.scaling.factor": 1e-20}, r"give frequencies from .* to 1e\+20; the highest of a trained model is"),
        ({"rope.scaling.factor": -2.0}, r"'llama\.rope\.scaling\.factor' must be a positive number, got -2\.0"),
        ({"rope.freq_base": 1e-30}, "give frequencies from "),
    ],
)
def test_gguf_errors_come_at_load(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(gguf_file(tmp_path, **metadata))


@pytest.mark.parametrize(
    ("metadata", "divisor"),
    [
        ({"rope.scaling.factor": 4.0}, 4),
        ({"rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, 1),
        ({"rope.scaling.type": "linear"}, 1),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, 1),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
        ({"rope.scaling.type": "none", "rope.scale_linear": 4.0}, 1),
    ],
)
def test_gguf_rope_scaling_as_llama_cpp_reads_it(tmp_path: Path, metadata: dict[str, Any], divisor: int) -> None:
    found = load_checkpoint(gguf_file(tmp_path, **metadata)).parameters.inverse_frequencies
    expected = 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / divisor
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- Hugging Face

CONFIG_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "tie_word_embeddings",
    "attention_bias",
    "no_rope_layers",
    "no_rope_layer_interval",
    "query_pre_attn_scalar",
    "quantization_config",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "logits_scaling",
    "use_qk_norm",
)
ROTARY_KEYS = (
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "short_factor",
    "long_factor",
)
NESTED = ({"a": 1}, {"a": {"b": [1]}}, [{"a": 1}], [], None, 10**400, -(10**400), [10**400])
JSON_VALUES = (*INTEGERS, *REALS, *OTHERS, *LISTS, *NESTED)


def test_damaged_config(tmp_path: Path) -> None:
    qwen = {"architectures": ..., "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}
    tensors = hugging_face_names()
    loaded = {}
    for base in ({}, qwen):
        path = hugging_face_folder(tmp_path, tensors, base)
        content = json.loads((path / "config.json").read_text())
        for key in CONFIG_KEYS if base == {} else ("architectures", "sliding_window", *qwen):
            for value in JSON_VALUES:
                (path / "config.json").write_text(json.dumps(content | {key: value}))
                loaded[key, repr(value)] = loads_or_says_why(path, f"{key}: {value!r:.50}")
    assert loaded["sliding_window", str(2**63)]
    assert not loaded["tie_word_embeddings", "'false'"]
    assert not loaded["eos_token_id", str(2**31)]
    assert not loaded["rms_norm_eps", repr(10**400)]


@pytest.mark.parametrize("changes", [{"head_dim": 2**30}, {"hidden_size": 2**30}])
def test_no_tables_are_made_for_heads_of_any_width(tmp_path: Path, changes: dict[str, int]) -> None:
    path = hugging_face_folder(tmp_path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(CheckpointError, match=r"has heads of \d+ features; supported: up to 65536"):
        load_checkpoint(path)


def test_deeply_nested_config(tmp_path: Path) -> None:
    """The parser gives up at some depth; up to there the error that shows the value must not."""
    path = hugging_face_folder(tmp_path)
    content = (path / "config.json").read_text().rstrip("}")
    for depth in (100, *range(800, 1010, 3), 100_000):
        (path / "config.json").write_text(f'{content}, "use_qk_norm": {"[" * depth}{"]" * depth}}}')
        assert not loads_or_says_why(path, f"{depth} lists")


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_damaged_rotary_settings(tmp_path: Path, name: str) -> None:
    path = hugging_face_folder(tmp_path)
    content = json.loads((path / "config.json").read_text())
    for kind in ("linear", "llama3", "yarn", "longrope"):
        right = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        right |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
        for key in ROTARY_KEYS:
            for value in JSON_VALUES:
                (path / "config.json").write_text(json.dumps(content | {name: right | {key: value}}))
                loads = loads_or_says_why(path, f"{kind} {key}: {value!r:.50}")
                # LongRoPE divides frequencies by lists of its own.
                assert kind == "longrope" or not (loads and key == "factor" and value == 1e-300)


def test_damaged_generation_config(tmp_path: Path) -> None:
    path = hugging_face_folder(tmp_path)
    for value in JSON_VALUES:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        loads_or_says_why(path, f"eos_token_id: {value!r:.50}")


TOKENIZER_KEYS = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "bos_token",
    "chat_template",
    "extra_special_tokens",
    "legacy",
    "pad_token",
    "sep_token",
    "tokenizer_class",
)


def test_damaged_tokenizer_config(tmp_path: Path) -> None:
    path = hugging_face_folder(tmp_path)
    loaded = {}
    for key in TOKENIZER_KEYS:
        for value in JSON_VALUES:
            (path / "tokenizer_config.json").write_text(json.dumps({key: value}))
            loaded[key, repr(value)] = loads_or_says_why(path, f"{key}: {value!r:.50}")
    assert loaded["bos_token", "None"]
    assert not loaded["bos_token", "1"]
    assert not loaded["added_tokens_decoder", "{'a': 1}"]


def test_damaged_index(tmp_path: Path) -> None:
    path = hugging_face_folder(tmp_path)
    (path / "model.safetensors").rename(path / "part.safetensors")
    index = path / "model.safetensors.index.json"
    maps: list[Any] = [*JSON_VALUES]
    names = (*JSON_VALUES, ".", "..", "a\0b", "part.safetensors/x", "/", "\ud800", [["part.safetensors"]])
    maps += [{"a": "part.safetensors", "b": name} for name in names]
    maps += [{str(i): f"missing-{i}.safetensors" for i in range(1000)}, {"x" * 10_000: "part.safetensors"}]
    for shards in maps:
        index.write_text(json.dumps({"weight_map": shards}))
        loads_or_says_why(path, f"{shards!r:.50}")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert loads_or_says_why(path, "right")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{}", r"index\.json: has no 'weight_map'"),
        (b'{"weight_map": {"a": ["b"]}}', r"index\.json: 'weight_map' must give a file's name .*, got \['b'\]"),
        (
            b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            r"index\.json: names files that are not there: model-00001-of-00002\.safetensors; download them",
        ),
        (b'{"weight_map": {"a": "../b"}}', r"index\.json: names a file outside its folder: '\.\./b'"),
    ],
)
def test_index_errors(tmp_path: Path, index: bytes, message: str) -> None:
    (hugging_face_folder(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ what is no plain file


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "part.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
@pytest.mark.timeout(60)
def test_files_of_a_folder_that_are_no_files(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = hugging_face_folder(tmp_path)
    if name in ("model.safetensors.index.json", "part.safetensors"):
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    (path / name).unlink(missing_ok=True)
    make(path / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: is not a regular file; put"):
        load_checkpoint(path)


@pytest.mark.timeout(60)
def test_gguf_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for path in (tmp_path / "model.gguf", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            load_checkpoint(path)


@pytest.mark.parametrize("path", ["x" * 10_000, "a\0b"])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder") as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < LONGEST_MESSAGE
