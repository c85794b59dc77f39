"""Quantized types of GGUF: each is executed in a scheme that holds it exactly, and the summary says which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import (
    KV_HEADS,
    Q_HEADS,
    SHAPES,
    VOCAB,
    Tensors,
    Type,
    encode,
    gguf_file,
    random_weights,
    write_gguf,
)

from palladion.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from palladion.model.gguf_blocks import BLOCK_FORMATS, split_rows
from palladion.model.transformer import empty_cache, forward
from palladion.reference.quantization import Order, QuantizedArray, check_parts, dequantize

FLOAT16_AT = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}
"""Bytes of a block at which its float16 numbers begin."""

FORMATS = {
    "Q4_0": ("int4-g32", "float16"),
    "Q4_1": ("int4-g32-minimums", "float16"),
    "Q5_0": ("int8-g32", "float16"),
    "Q5_1": ("int8-g32-minimums", "float16"),
    "Q8_0": ("int8-g32", "float16"),
    "Q2_K": ("int4-g16-minimums", "float32"),
    "Q3_K": ("int4-g16", "float32"),
    "Q4_K": ("int4-g32-minimums", "float32"),
    "Q5_K": ("int8-g32-minimums", "float32"),
    "Q6_K": ("int8-g16", "float32"),
    "IQ4_NL": ("int8-g32", "float16"),
    "IQ4_XS": ("int8-g32", "float32"),
    "MXFP4": ("mxfp4", "float8_e8m0fnu"),
}
"""Schemes and dtypes of scales."""

HIDDEN = 256
"""Width that blocks of 256 weights divide."""

METADATA = {"block_count": 1, "embedding_length": HIDDEN, "feed_forward_length": HIDDEN}


def random_rows(name: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Returns rows `[out, bytes]` of random blocks, whose weights are about 0.1."""
    generator = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[Type[name]]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = generator.integers(116, 124, blocks.shape[:-1])
        return blocks.reshape(shape[0], -1)
    unit = 0.1 / np.abs(gguf.quants.dequantize(with_float16(name, blocks, 1.0), Type[name])).max()
    factors = generator.uniform(0.5, 1.0, blocks.shape[:-1]) * generator.choice([-1, 1], blocks.shape[:-1])
    return with_float16(name, blocks, factors * unit).reshape(shape[0], -1)


def with_float16(name: str, blocks: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    blocks = blocks.copy()
    for start in FLOAT16_AT[name]:
        numbers = np.broadcast_to(np.asarray(values, np.float16), blocks.shape[:-1])
        blocks[..., start : start + 2] = np.ascontiguousarray(numbers)[..., None].view(np.uint8)
    return blocks


def test_every_type_is_tested() -> None:
    assert FORMATS.keys() == BLOCK_FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_split_without_loss(name: str) -> None:
    rows = random_rows(name, (7, 3 * HIDDEN))
    block_format = BLOCK_FORMATS[name]
    parts = split_rows(rows, 3 * HIDDEN, block_format, at_once=2 * 3 * HIDDEN)
    minimums = None if parts.minimums is None else jnp.asarray(parts.minimums)
    scales = jnp.asarray(parts.scales)
    weight = QuantizedArray(jnp.asarray(parts.values), scales, None, minimums, block_format.scheme, "out_in")
    check_parts(weight)
    assert (str(weight.scheme), str(weight.scales.dtype)) == FORMATS[name]
    np.testing.assert_array_equal(np.asarray(dequantize(weight)).T, gguf.quants.dequantize(rows, Type[name]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", ["in_out", "out_in"])
def test_weights_are_loaded_in_the_files_format(tmp_path: Path, name: str, order: Order) -> None:
    tensors = wide_tensors(name)
    loaded = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors, METADATA), order=order)
    scheme, _ = FORMATS[name]
    layer = loaded.parameters.layers[0]
    pairs = [
        (layer.qkv, ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]),
        (layer.gate_up, ["blk.0.ffn_gate", "blk.0.ffn_up"]),
        (layer.output, ["blk.0.attn_output"]),
        (layer.down, ["blk.0.ffn_down"]),
        (loaded.parameters.head, ["token_embd"]),
    ]
    for weight, names in pairs:
        assert isinstance(weight, QuantizedArray)
        assert (str(weight.scheme), weight.order) == (scheme, order)
        rows = [gguf.quants.dequantize(tensors[one][0], Type[name]) for one in names]
        np.testing.assert_array_equal(np.asarray(dequantize(weight)).T, np.concatenate(rows))
    assert f"{name} as {scheme} without loss" in loaded.summary


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "MXFP4"])
def test_logits_are_those_of_dequantized_weights(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", wide_tensors(name), METADATA)
    given, wanted = (logits(load_checkpoint(path, weights=weights)) for weights in ("keep", "dequantize"))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "damaged"), [(name, start) for name, starts in FLOAT16_AT.items() for start in starts or (0,)]
)
def test_factors_that_are_not_finite_are_reported(tmp_path: Path, name: str, damaged: int) -> None:
    tensors = wide_tensors(name)
    rows, kind = tensors["blk.0.ffn_down"]
    rows = rows.copy()
    if name == "MXFP4":
        rows[3, damaged] = 255
    else:
        rows[3, damaged : damaged + 2] = np.array([np.inf], np.float16).view(np.uint8)
    tensors["blk.0.ffn_down"] = (rows, kind)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down.*not finite, the file is damaged"):
        load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors, METADATA))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Q8_0 as int8-g32 without loss"),
        ({"weights": "dequantize"}, "Q8_0 dequantized to float32$"),
        ({"weights": "dequantize", "dtype": "bfloat16"}, "Q8_0 dequantized to bfloat16, rounded"),
        ({"quantize": "int4-g32"}, "Q8_0 quantized again to int4-g32"),
    ],
)
def test_summary_says_what_became_of_weights(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = gguf_file(tmp_path, Type.Q8_0, tied=True)
    loaded = load_checkpoint(path, **options)
    read = loaded.parameters.bytes_per_step(batch=1)
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    sizes = f"weights of {stored / 1e6:.2f} MB in the file, {read / 1e6:.2f} MB read by a step"
    assert loaded.summary.startswith(sizes)
    assert re.search(words, loaded.summary)


def test_types_without_a_scheme_are_dequantized_and_said(tmp_path: Path) -> None:
    weights = random_weights()
    tensors = encode(weights, lambda _: Type.F32)
    tensors["blk.0.ffn_down"] = (gguf.quants.quantize(weights["blk.0.ffn_down"], Type.TQ1_0), Type.TQ1_0)
    loaded = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors), dtype="bfloat16")
    assert loaded.summary.endswith(": TQ1_0 dequantized to bfloat16, rounded")


def wide_tensors(name: str) -> Tensors:
    """Returns a model of one layer whose weights all have a type, their rows in the model's order."""
    keys = HIDDEN * KV_HEADS // Q_HEADS
    outputs = {"attn_k": keys, "attn_v": keys}
    tensors: Tensors = {"token_embd": (random_rows(name, (VOCAB, HIDDEN), 1), Type[name])}
    for seed, part in enumerate(SHAPES):
        tensors[f"blk.0.{part}"] = (random_rows(name, (outputs.get(part, HIDDEN), HIDDEN), 2 + seed), Type[name])
    norms = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    return tensors | {norm: (np.ones(HIDDEN, np.float32), None) for norm in norms}


def logits(checkpoint: Checkpoint) -> np.ndarray:
    parameters, config = checkpoint.parameters, checkpoint.config
    cache = empty_cache(parameters, config, 1, 8, "float32")
    run = jax.jit(forward, static_argnums=1)
    result, _ = run(parameters, config, jnp.arange(1, 6)[None], jnp.array([5]), cache)
    return np.asarray(result)
