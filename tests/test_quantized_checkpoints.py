"""Quantized checkpoints as they are published, written here from the formats' specifications, load without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_checkpoints import (
    HUGGING_FACE,
    hugging_face_folder,
    hugging_face_names,
    random_weights,
)

from palladion.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from palladion.model.transformer import empty_cache, forward
from palladion.reference.quantization import QuantizedArray, check_parts, dequantize

Tensors = dict[str, np.ndarray]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Names of types in safetensors."""


class Stored(NamedTuple):
    """A quantized layer: its tensors by the end of their names, and the weights `[out, in]` that they stand for."""

    parts: Tensors
    dense: np.ndarray


Write = Callable[[np.random.Generator, int, int], Stored]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes `[rows, n]` to int32 `[rows, n * bits / 32]` one by one, the first in the lowest bits."""
    count = 32 // bits
    result = np.zeros((codes.shape[0], -(-codes.shape[1] // count)), np.uint32)
    for column in range(codes.shape[1]):
        result[:, column // count] |= codes[:, column].astype(np.uint32) << np.uint32(bits * (column % count))
    return result.view(np.int32)


def grouped(generator: np.random.Generator, out: int, groups: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scales in float16 and zero points that are no symmetric ones, `[out, groups]`."""
    scales = (generator.uniform(0.5, 1, (out, groups)) / 2**bits).astype(np.float16)
    return scales, generator.integers(0, 2**bits, (out, groups))


def gptq(bits: int, group: int, *, symmetric: bool = False, version: int = 1, act_order: bool = False) -> Write:
    def write(generator: np.random.Generator, out: int, in_features: int) -> Stored:
        size = in_features if group == -1 else group
        groups = in_features // size
        codes = generator.integers(0, 2**bits, (out, in_features))
        scales, zeros = grouped(generator, out, groups, bits)
        if symmetric:
            zeros[:] = 2 ** (bits - 1)
        g_idx = np.arange(in_features) // size
        if act_order:
            g_idx = generator.permutation(g_idx)
        dense = (codes - zeros[:, g_idx]) * scales.astype(np.float32)[:, g_idx]
        stored = (zeros - 1) % 2**bits if version == 1 else zeros
        parts = {
            "qweight": words(codes, bits).T,
            "qzeros": words(stored.T, bits),
            "scales": scales.T,
            "g_idx": g_idx.astype(np.int32),
        }
        return Stored(parts, dense)

    return write


def awq(group: int) -> Write:
    def write(generator: np.random.Generator, out: int, in_features: int) -> Stored:
        codes = generator.integers(0, 16, (in_features, out))
        scales, zeros = grouped(generator, out, in_features // group, 4)
        dense = (codes.T - np.repeat(zeros, group, 1)) * np.repeat(scales.astype(np.float32), group, 1)

        def pack(rows: np.ndarray) -> np.ndarray:
            result = np.zeros((len(rows), out // 8), np.uint32)
            for column in range(out // 8):
                for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    result[:, column] |= rows[:, 8 * column + channel].astype(np.uint32) << np.uint32(4 * nibble)
            return result.view(np.int32)

        return Stored({"qweight": pack(codes), "qzeros": pack(zeros.T), "scales": scales.T}, dense)

    return write


def packed(bits: int, group: int | None, *, zeros: str | None = None, act_order: bool = False) -> Write:
    """Integers of compressed-tensors; zero points are "packed", "plain" or None."""

    def write(generator: np.random.Generator, out: int, in_features: int) -> Stored:
        size, middle = group or in_features, 2 ** (bits - 1)
        codes = generator.integers(-middle, middle, (out, in_features))
        scales, points = grouped(generator, out, in_features // size, bits)
        scales = scales.astype(ml_dtypes.bfloat16)
        points = points - middle if zeros else np.zeros_like(points)
        g_idx = np.arange(in_features) // size
        if act_order:
            g_idx = generator.permutation(g_idx)
        dense = (codes - points[:, g_idx]) * scales.astype(np.float32)[:, g_idx]
        parts = {
            "weight_packed": words(codes + middle, bits),
            "weight_scale": scales,
            "weight_shape": np.array([out, in_features], np.int64),
        }
        if zeros == "packed":
            parts["weight_zero_point"] = words((points + middle).T, bits).T
        elif zeros == "plain":
            parts["weight_zero_point"] = points.astype(np.int8)
        if act_order:
            parts["weight_g_idx"] = g_idx.astype(np.int32)
        return Stored(parts, dense)

    return write


def mxfp4(generator: np.random.Generator, out: int, in_features: int) -> Stored:
    codes = generator.integers(0, 16, (out, in_features))
    exponents = generator.integers(120, 126, (out, in_features // 32)).astype(np.uint8)
    dense = np.array(E2M1)[codes] * np.repeat(2.0 ** (exponents.astype(int) - 127), 32, axis=1)
    pairs = codes[:, ::2] | (codes[:, 1::2] << 4)
    return Stored({"weight_packed": pairs.astype(np.uint8), "weight_scale": exponents}, dense)


def scaled(
    kind: str,
    scales: tuple[int | None, int | None],
    *,
    name: str = "weight_scale",
    zeros: bool = False,
    flat: bool = False,
) -> Write:
    """Codes of a byte with a scale for each block of `scales` rows and columns, None for all of them."""

    def write(generator: np.random.Generator, out: int, in_features: int) -> Stored:
        rows, columns = scales[0] or out, scales[1] or in_features
        shape = (-(-out // rows), -(-in_features // columns))
        factors = generator.uniform(0.5, 1, shape).astype(np.float32) / 100
        points = generator.integers(-9, 9, shape).astype(np.int8) if zeros else np.zeros(shape, np.int8)
        if kind == "int8":
            codes = generator.integers(-128, 128, (out, in_features)).astype(np.int8)
        else:
            codes = generator.normal(0, 20, (out, in_features)).astype(ml_dtypes.finfo(kind).dtype)

        def spread(array: np.ndarray) -> np.ndarray:
            return np.repeat(np.repeat(array, rows, 0), columns, 1)[:out, :in_features].astype(np.float32)

        dense = (codes.astype(np.float32) - spread(points)) * spread(factors)
        parts = {"weight": codes, name: factors.reshape(-1) if flat else factors}
        if zeros:
            parts["weight_zero_point"] = points
        return Stored(parts | {"input_scale": np.ones(1, np.float32)}, dense)

    return write


def gptq_config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False, **more}


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def compressed(format_: str, bits: int = 8, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [32, 32]}
INT4_GROUPS = compressed("pack-quantized", 4, type="int", strategy="group", group_size=32)

FORMATS: dict[str, tuple[Write, dict[str, Any], str | None]] = {
    "gptq": (gptq(4, 32), gptq_config(4, 32), "int4-g32-zeros"),
    "gptq symmetric": (gptq(4, 32, symmetric=True), gptq_config(4, 32, sym=True), "int4-g32"),
    "gptq one group": (gptq(4, -1), gptq_config(4, -1), "int4-zeros"),
    "gptq v2": (gptq(4, 32, version=2), gptq_config(4, 32, checkpoint_format="gptq_v2"), "int4-g32-zeros"),
    "gptq 8": (gptq(8, 32), gptq_config(8, 32), "int8-g32-zeros"),
    "gptq 8 symmetric": (gptq(8, 16, symmetric=True), gptq_config(8, 16, sym=True), "int8-g16"),
    "gptq act-order": (gptq(4, 16, act_order=True), gptq_config(4, 16, desc_act=True), None),
    "gptq small groups": (gptq(4, 8), gptq_config(4, 8), None),
    "awq": (awq(32), AWQ_CONFIG, "int4-g32-zeros"),
    "int4": (packed(4, 32), INT4_GROUPS, "int4-g32"),
    "int4 zeros": (packed(4, 32, zeros="packed"), INT4_GROUPS, "int4-g32-zeros"),
    "int4 plain zeros": (packed(4, 32, zeros="plain"), INT4_GROUPS, "int4-g32-zeros"),
    "int4 channels": (packed(4, None), compressed("pack-quantized", 4, strategy="channel"), "int4"),
    "int4 act-order": (packed(4, 32, act_order=True), INT4_GROUPS, None),
    "int8 packed": (packed(8, None), compressed("pack-quantized", 8, strategy="channel"), "int8"),
    "int8": (scaled("int8", (1, None)), compressed("int-quantized", strategy="channel"), "int8"),
    "int8 zeros": (
        scaled("int8", (1, None), zeros=True),
        compressed("int-quantized", strategy="channel"),
        "int8-zeros",
    ),
    "mxfp4": (mxfp4, compressed("mxfp4-pack-quantized", 4), "mxfp4"),
    "float8 channels": (
        scaled("float8_e4m3fn", (1, None)),
        compressed("float-quantized", type="float", strategy="channel"),
        "float8_e4m3fn",
    ),
    "float8 groups": (
        scaled("float8_e4m3fn", (1, 32)),
        compressed("naive-quantized", type="float", strategy="group", group_size=32),
        "float8_e4m3fn-g32",
    ),
    "fp8 tensor": (scaled("float8_e4m3fn", (None, None), flat=True), FP8, "float8_e4m3fn"),
    "fp8 e5m2": (scaled("float8_e5m2", (None, None), flat=True), FP8, "float8_e5m2"),
    "fp8 channels": (scaled("float8_e4m3fn", (1, None), flat=True), {"quant_method": "fbgemm_fp8"}, "float8_e4m3fn"),
    "fp8 blocks": (scaled("float8_e4m3fn", (32, 32), name="weight_scale_inv"), BLOCKS, "float8_e4m3fn-g32"),
    "fp8 blocks of odd size": (
        scaled("float8_e4m3fn", (48, 48), name="weight_scale_inv"),
        FP8 | {"weight_block_size": [48, 48]},
        "float8_e4m3fn-g16",
    ),
}
"""How a layer is written, quantization_config, and the scheme that it is executed in; None for dequantized weights."""


def write(
    path: Path,
    write_layer: Write,
    config: dict[str, Any],
    *,
    weights: Tensors | None = None,
    quantized: tuple[str, ...] = ("_proj",),
    added: dict[str, np.ndarray | None] | None = None,
    **more: Any,
) -> tuple[Path, Tensors]:
    """Writes a checkpoint; returns its folder and the weights that it stands for, by their names in it.

    Args:
      path: the folder.
      write_layer: writes a linear layer.
      config: quantization_config.
      weights: all weights in floats; their values are used where a layer is not quantized.
      quantized: parts of the names of layers that are.
      added: tensors that are added or replaced, or left out where they are None.
      more: fields of config.json.
    """
    generator = np.random.default_rng(3)
    tensors = dict(weights or hugging_face_names())
    dense = dict(tensors)
    for name in [name for name in tensors if any(part in name for part in quantized)]:
        stored = write_layer(generator, *tensors.pop(name).shape)
        dense[name] = stored.dense.astype(np.float32)
        tensors |= {f"{name.removesuffix('weight')}{part}": array for part, array in stored.parts.items()}
    given = {name: array for name, array in (tensors | (added or {})).items() if array is not None}
    return save(path, given, config, **more), dense


def save(path: Path, tensors: Tensors, config: dict[str, Any], **more: Any) -> Path:
    """Writes a folder; safetensors' own writer has no 8-bit floats."""
    folder = hugging_face_folder(path, {}, {"quantization_config": config, **more})
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": TYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def rows_of(weight: Any) -> np.ndarray:
    """Returns `[out, in]` of a weight in the order "in_out"."""
    parts = weight if isinstance(weight, tuple) else (weight,)
    return np.concatenate([np.asarray(dequantize(w) if isinstance(w, QuantizedArray) else w).T for w in parts])


def weights_of(checkpoint: Checkpoint) -> list[tuple[Any, list[str]]]:
    """Returns the weights of all layers, and the names of the tensors that are joined in each."""
    joined = {
        "qkv": ("attn_q", "attn_k", "attn_v"),
        "output": ("attn_output",),
        "gate_up": ("ffn_gate", "ffn_up"),
        "down": ("ffn_down",),
    }
    return [
        (getattr(layer, part), [f"model.layers.{index}.{HUGGING_FACE[name]}.weight" for name in names])
        for index, layer in enumerate(checkpoint.parameters.layers)
        for part, names in joined.items()
    ]


def logits(checkpoint: Checkpoint) -> np.ndarray:
    parameters, config = checkpoint.parameters, checkpoint.config
    cache = empty_cache(parameters, config, 1, 8, "float32")
    run = jax.jit(forward, static_argnums=1)
    result, _ = run(parameters, config, jnp.arange(1, 6)[None], jnp.array([5]), cache)
    return np.asarray(result)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_executed_in_the_files_format(tmp_path: Path, name: str) -> None:
    write_layer, config, scheme = FORMATS[name]
    folder, expected = write(tmp_path, write_layer, config)
    loaded = load_checkpoint(folder, order="in_out")
    for weight, names in weights_of(loaded):
        if scheme is None:
            assert isinstance(weight, jax.Array)
        else:
            assert isinstance(weight, QuantizedArray)
            check_parts(weight)
            assert str(weight.scheme) == scheme
        np.testing.assert_array_equal(rows_of(weight), np.concatenate([expected[one] for one in names]))
    ending = "dequantized to float32" if scheme is None else f"as {scheme} without loss"
    assert loaded.summary.endswith(ending)
    assert loaded.summary.count(";") == 0
    dense = load_checkpoint(folder, weights="dequantize", order="out_in")
    for weight, names in weights_of(dense):
        np.testing.assert_array_equal(weight, np.concatenate([expected[one] for one in names]))


@pytest.mark.parametrize("name", ["gptq", "fp8 blocks", "mxfp4"])
def test_logits_are_those_of_the_weights(tmp_path: Path, name: str) -> None:
    """The other model has the weights that the test itself computed, as a checkpoint of floats."""
    folder, expected = write(tmp_path / "quantized", *FORMATS[name][:2])
    given = logits(load_checkpoint(folder))
    wanted = logits(load_checkpoint(hugging_face_folder(tmp_path / "dense", expected)))
    np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_rows_of_queries_and_keys_are_reordered(tmp_path: Path) -> None:
    """Cohere has the two coordinates of a rotary pair next to each other."""
    cohere = {"architectures": ["CohereForCausalLM"], "logit_scale": 1.0, "tie_word_embeddings": True}
    tensors = hugging_face_names(random_weights(tied=True))
    weights = {name: array for name, array in tensors.items() if "post_attention" not in name}
    folder, expected = write(tmp_path / "quantized", *FORMATS["gptq"][:2], weights=weights, **cohere)
    given = load_checkpoint(folder, order="in_out")
    dense = load_checkpoint(hugging_face_folder(tmp_path / "dense", expected, cohere), order="in_out")
    for (weight, names), (other, _) in zip(weights_of(given), weights_of(dense), strict=True):
        np.testing.assert_array_equal(rows_of(weight), rows_of(other))
        if len(names) == 3:
            assert (rows_of(other) != np.concatenate([expected[name] for name in names])).any()


def test_a_quantized_output_head_and_layers_that_stay_floats(tmp_path: Path) -> None:
    folder, expected = write(tmp_path, *FORMATS["gptq"][:2], quantized=("lm_head", "up_proj", "k_proj"))
    parameters = load_checkpoint(folder, order="in_out").parameters
    assert isinstance(parameters.head, QuantizedArray)
    np.testing.assert_array_equal(rows_of(parameters.head), expected["lm_head.weight"])
    assert isinstance(parameters.layers[0].qkv, tuple)
    assert [isinstance(part, QuantizedArray) for part in parameters.layers[0].qkv] == [False, True, False]
    np.testing.assert_array_equal(
        rows_of(parameters.layers[1].gate_up),
        np.concatenate([expected[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]),
    )


def test_quantize_takes_precedence(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, *FORMATS["fp8 tensor"][:2])
    loaded = load_checkpoint(folder, quantize="int8")
    assert str(loaded.parameters.layers[0].down.scheme) == "int8"
    assert "float8_e4m3fn quantized again to int8" in loaded.summary


def test_scales_of_a_quantized_cache_are_ignored(tmp_path: Path) -> None:
    write_layer, config, _ = FORMATS["fp8 tensor"]
    scales = {f"model.layers.0.self_attn.{name}_scale": np.ones(1, np.float32) for name in "kv"}
    folder, _ = write(tmp_path, write_layer, config, added=scales)
    load_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "quantized by 'bitsandbytes nf4' are not supported; supported: gptq, awq, .*; take the unquantized",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "by 'bitsandbytes int8' are not supported"),
        ({"quant_method": "hqq"}, "by 'hqq' are not supported; supported: gptq, awq, compressed-tensors, fp8"),
        ({"bits": 4}, "by '' are not supported"),
        (gptq_config(3, 32), r"'bits' 3 is not supported; supported: 4, 8; take the unquantized"),
        (gptq_config(4, 32, checkpoint_format="marlin"), "'checkpoint_format' 'marlin' is not supported"),
        (gptq_config(4, 0), "'group_size' must be a positive integer, got 0"),
        (AWQ_CONFIG | {"version": "gemv"}, "'version' 'gemv' is not supported; supported: 'gemm'"),
        (AWQ_CONFIG | {"zero_point": False}, "'zero_point' False is not supported"),
        (FP8 | {"weight_block_size": 128}, "'weight_block_size' must be two integers, got 128"),
        (compressed("nvfp4-pack-quantized", 4), "'format' 'nvfp4-pack-quantized' is not supported; supported: 'pack-"),
        (compressed("pack-quantized", 3, strategy="channel"), r"'weights\.num_bits' 3 is not supported"),
        (compressed("pack-quantized", 4, strategy="group"), "'group_size' must be a positive integer, got None"),
        (INT4_GROUPS | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config.format' 'sparse-24-bit"),
        (INT4_GROUPS | {"config_groups": {}}, "'config_groups' is missing"),
    ],
)
def test_methods_that_are_not_supported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = hugging_face_folder(tmp_path, config={"quantization_config": config})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "part", "array", "message"),
    [
        ("gptq", "qzeros", None, "is missing"),
        ("gptq", "qweight", None, "is missing"),
        ("gptq", "scales", np.ones((4, 64), np.float16), r"has shape \[4, 64\], but .* ask for \[8, 64\]"),
        ("gptq", "qzeros", np.ones((8, 64), np.int32), r"has shape \[8, 64\], but .* ask for \[8, 8\]"),
        ("gptq", "g_idx", np.zeros(255, np.int32), r"has shape \[255\], but .* ask for \[256\]"),
        ("gptq", "g_idx", np.full(256, 8, np.int32), "has groups 8 to 8, but the scales have 0 to 7"),
        ("gptq", "g_idx", np.full(256, -1, np.int32), "has groups -1 to -1, but the scales have 0 to 7"),
        ("gptq", "qweight", np.ones((32, 64), np.float32), "has type F32, but the format asks for I32"),
        ("gptq", "qweight", np.ones(64, np.int32), r"has shape \[64\], but the format asks for 2 dimensions"),
        ("gptq", "scales", np.full((8, 64), np.nan, np.float16), "not finite"),
        ("awq", "scales", np.ones((8, 8), np.float16), r"has shape \[8, 8\], but .* ask for \[8, 64\]"),
        ("awq", "qzeros", None, "is missing"),
        ("int4", "weight_shape", None, "is missing"),
        ("int4", "weight_shape", np.array([64, -1]), "holds 64 and -1, which is no shape"),
        ("int4", "weight_packed", np.ones((64, 64), np.int32), r"has shape \[64, 64\], but .* ask for \[64, 32\]"),
        ("int4", "weight_scale", np.ones((64, 4), np.float32), r"has shape \[64, 4\], but .* ask for \[64, 8\]"),
        ("int4 zeros", "weight_zero_point", np.ones((64, 8), np.int32), r"shape \[64, 8\], but .* ask for \[8, 8\]"),
        ("fp8 tensor", "weight_scale", None, "or weight_scale_inv is missing"),
        ("fp8 blocks", "weight_scale_inv", np.ones((2, 4), np.float32), r"shape \[2, 4\], but .* ask for \[2, 8\]"),
        ("fp8 channels", "weight_scale", np.ones(8, np.float32), r"has shape \[8\], but a weight of \[64, 256\]"),
        ("fp8 tensor", "weight", np.full((64, 256), np.nan, ml_dtypes.float8_e4m3fn), "not finite"),
        ("mxfp4", "weight_scale", np.full((64, 8), 255, np.uint8), "not finite"),
    ],
)
def test_errors_name_the_tensor(tmp_path: Path, name: str, part: str, array: np.ndarray | None, message: str) -> None:
    folder, _ = write(tmp_path, *FORMATS[name][:2], added={f"{DOWN}.{part}": array})
    whole = "weight" if message == "not finite" else part
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{DOWN}\.{whole}' .*{message}"):
        load_checkpoint(folder)


def test_a_group_size_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, gptq(4, 32), gptq_config(4, 64))
    with pytest.raises(CheckpointError, match=r"down_proj\.scales' has shape \[8, 64\], but .* ask for \[4, 64\]"):
        load_checkpoint(folder)


def test_a_weight_of_another_model(tmp_path: Path) -> None:
    wrong = gptq(4, 32)(np.random.default_rng(0), 32, 64).parts
    folder, _ = write(tmp_path, *FORMATS["gptq"][:2], added={f"{DOWN}.{part}": one for part, one in wrong.items()})
    with pytest.raises(CheckpointError, match=rf"'{DOWN}\.weight' has shape \[32, 64\], but the checkpoint's config"):
        load_checkpoint(folder)
