"""The model against transformers on the same weights, and against itself in other pieces.

The oracle is transformers in float64; the reference whose error bounds ours is transformers in float32.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import VOCAB, save_with_transformers

from palladion.kernels.backend import record_choices
from palladion.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from palladion.model.config import ModelConfig
from palladion.model.locate import find_model
from palladion.model.transformer import empty_cache, forward
from palladion.reference.compare import assert_right
from palladion.reference.quantization import Order

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 24))

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def logits_of(model: Any, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model.to(getattr(torch, dtype))
        return model(torch.as_tensor(np.asarray(tokens, np.int64)), use_cache=False).logits.double().numpy()


class Judge:
    """A checkpoint, and what transformers makes of TOKENS with it."""

    def __init__(self, path: Path, architecture: str, stack: bool, order: Order | None = None, **config: Any) -> None:
        model = save_with_transformers(path, architecture, max_position_embeddings=64, **config)
        self.reference = logits_of(model, TOKENS, "float32").astype(np.float32)
        self.oracle = logits_of(model, TOKENS, "float64")
        self.checkpoint = load_checkpoint(path, stack=stack, order=order)

    def check(self, logits: jax.Array, rows: Any = slice(None), positions: Any = slice(None)) -> None:
        assert_right(logits, self.reference[rows, positions], self.oracle[rows, positions])


@functools.cache
def compiled(config: ModelConfig, **options: Any) -> Any:
    call = functools.partial(forward, config=config, **options)
    return jax.jit(
        lambda parameters, tokens, lengths, cache: call(parameters, tokens=tokens, lengths=lengths, cache=cache)
    )


def run(checkpoint: Checkpoint, cache: Any, tokens: np.ndarray, lengths: Any, **options: Any) -> tuple[jax.Array, Any]:
    arrays = (jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), cache)
    return compiled(checkpoint.config, **options)(checkpoint.parameters, *arrays)


def new_cache(checkpoint: Checkpoint, batch: int, dtype: str = "float32", max_len: int = 48) -> Any:
    return empty_cache(checkpoint.parameters, checkpoint.config, batch, max_len, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("architecture", "config", "stack"),
    [
        pytest.param("Llama", {"tie_word_embeddings": True}, True, id="tied"),
        pytest.param("Llama", {"tie_word_embeddings": True, "order": "out_in"}, True, id="tied-out-in"),
        pytest.param("Llama", {"tie_word_embeddings": False}, False, id="untied-apart"),
        pytest.param("Llama", {"tie_word_embeddings": False, "order": "out_in"}, False, id="untied-out-in"),
        pytest.param("Llama", {"rope_scaling": LLAMA_3, "rope_theta": 500_000.0}, True, id="llama-3"),
        pytest.param("Llama", {"attention_bias": True}, True, id="biases"),
        pytest.param("Llama", {"head_dim": 32}, False, id="wide-heads"),
        pytest.param("Mistral", {"sliding_window": 7, "head_dim": 16}, True, id="window"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, architecture: str, config: dict[str, Any], stack: bool):
    """Compares a prompt's logits, then those of single tokens, whose steps read the cache."""
    judge = Judge(tmp_path, architecture, stack, **config)
    cache = new_cache(judge.checkpoint, 3)
    logits, cache = run(judge.checkpoint, cache, TOKENS[:, :10], [10] * 3, every_position=True)
    judge.check(logits, positions=slice(10))
    for position in range(10, 24):
        logits, cache = run(judge.checkpoint, cache, TOKENS[:, position : position + 1], [position + 1] * 3)
        judge.check(logits, positions=position)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("llama"), "Llama", True, tie_word_embeddings=True)


def test_a_prompt_in_chunks(judge: Judge):
    cache = new_cache(judge.checkpoint, 3)
    for start in range(0, 24, 8):
        logits, cache = run(judge.checkpoint, cache, TOKENS[:, start : start + 8], [start + 8] * 3, every_position=True)
        judge.check(logits, positions=slice(start, start + 8))


def test_prompts_of_different_lengths(judge: Judge):
    """Prompts are aligned at their ends with arbitrary padding; one of them begins in the second chunk."""
    lengths = np.array([24, 5, 13])
    aligned = np.full((3, 24), 1)
    for row, length in enumerate(lengths):
        aligned[row, 24 - length :] = TOKENS[row, :length]
    logits, cache = run(judge.checkpoint, new_cache(judge.checkpoint, 3), aligned[:, :16], np.maximum(lengths - 8, 0))
    logits, cache = run(judge.checkpoint, cache, aligned[:, 16:], lengths)
    for row, length in enumerate(lengths):
        judge.check(logits[row], rows=row, positions=length - 1)
    logits, cache = run(judge.checkpoint, cache, TOKENS[[1, 1, 2], [5, 5, 13]][:, None], [24, 6, 14])
    judge.check(logits[1], rows=1, positions=5)
    judge.check(logits[2], rows=2, positions=13)


@pytest.fixture(scope="module")
def gpu_judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """The same model with weights in the order of a GPU's kernels."""
    return Judge(tmp_path_factory.mktemp("llama"), "Llama", True, order="out_in", tie_word_embeddings=True)


@pytest.mark.parametrize("backend", ["mosaic_tpu", "triton"])
def test_kernels_give_the_same_logits(request: pytest.FixtureRequest, backend: str):
    judge = request.getfixturevalue("gpu_judge" if backend == "triton" else "judge")
    cache = new_cache(judge.checkpoint, 3, max_len=128)  # tokens are lanes of a TPU where heads are narrow
    logits, cache = run(judge.checkpoint, cache, TOKENS[:, :16], [16] * 3, backend=backend, interpret=True)
    judge.check(logits, positions=15)
    logits, cache = run(judge.checkpoint, cache, TOKENS[:, 16:17], [17] * 3, backend=backend, interpret=True)
    judge.check(logits, positions=16)


@pytest.mark.parametrize(
    ("platform", "kind", "row"), [("tpu", "TPU v6 lite", "mosaic_tpu"), ("gpu", "NVIDIA H100 80GB HBM3", "triton")]
)
@pytest.mark.parametrize("q_len", [1, 16])
def test_a_backend_means_the_same_for_every_operation(
    request: pytest.FixtureRequest, platform: str, kind: str, row: str, q_len: int
):
    judge = request.getfixturevalue("gpu_judge" if platform == "gpu" else "judge")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    cache = jax.eval_shape(lambda: new_cache(judge.checkpoint, 3, max_len=128))
    arrays = (jax.ShapeDtypeStruct((3, q_len), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32), cache)
    for backend, expected in (("auto", row), ("pallas", row), (row, row), ("xla", "xla")):
        call = functools.partial(forward, config=judge.checkpoint.config, backend=backend)
        with jax.sharding.use_abstract_mesh(mesh), record_choices() as choices:
            jax.eval_shape(
                lambda parameters, tokens, lengths, cache, call=call: call(
                    parameters, tokens=tokens, lengths=lengths, cache=cache
                ),
                judge.checkpoint.parameters,
                *arrays,
            )
        taken = {choice.operation: choice.backend for choice in choices}
        assert set(taken) == {"append_qkv", "decode_attention", "matmul"}
        if (platform, backend) == ("gpu", "auto"):
            assert taken.pop("matmul") == "xla"  # no slower than the kernel, where it was measured
        assert set(taken.values()) == {expected}


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_narrow_caches_change_little(judge: Judge, kv_dtype: str):
    cache = new_cache(judge.checkpoint, 3, kv_dtype)
    # A number of the cache is off by at most eps / 2, and attention averages over them.
    eps = {"bfloat16": 2**-8, "int8": 2**-7, "float8_e4m3fn": 2**-3}[kv_dtype]
    for start, end in ((0, 16), *((position, position + 1) for position in range(16, 24))):
        logits, cache = run(judge.checkpoint, cache, TOKENS[:, start:end], [end] * 3)
        exact = judge.oracle[:, end - 1]
        assert np.abs(np.asarray(logits) - exact).max() <= eps * np.abs(exact).max()


def test_the_cache_is_updated_in_place(judge: Judge):
    """A donated cache is aliased to the result, and the program allocates no array of its size."""
    checkpoint = judge.checkpoint
    cache = new_cache(checkpoint, 1, max_len=4096)
    call = functools.partial(forward, config=checkpoint.config)
    for q_len in (1, 16):
        lowered = jax.jit(
            lambda parameters, cache, tokens, lengths: call(parameters, cache=cache, tokens=tokens, lengths=lengths),
            donate_argnums=1,
        ).lower(checkpoint.parameters, cache, jnp.zeros((1, q_len), jnp.int32), jnp.full(1, q_len, jnp.int32))
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes == cache.nbytes
        assert memory.temp_size_in_bytes < cache.k.nbytes / 2


@pytest.mark.peer
@pytest.mark.parametrize(("weights", "dtype"), [("keep", "float32"), ("dequantize", "float32")])
def test_smollm2_is_that_of_transformers(weights: Any, dtype: str):
    """The real model, its weights dequantized by transformers' own GGUF reader."""
    try:
        path = find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = load_checkpoint(path, weights=weights, dtype=dtype, stack=True)
    tokens = np.array([checkpoint.tokenizer.encode("The capital of France is Paris. It lies on the river Seine.")])
    exact = logits_of(model, tokens, "float64")
    cache = new_cache(checkpoint, 1, max_len=64)
    logits, cache = run(checkpoint, cache, tokens, [tokens.shape[1]], every_position=True)
    # Thirty layers of some ten roundings each: their sum is some tens of eps. A wrong norm, angle or weight is off by
    # thousands of times that.
    assert np.abs(np.asarray(logits) - exact).max() <= 100 * np.finfo(np.float32).eps * np.abs(exact).max()
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), np.argmax(exact, axis=-1))
    assert checkpoint.tokenizer.decode([int(logits[0, 4].argmax())]) == " Paris"
