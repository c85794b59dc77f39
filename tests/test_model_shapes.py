"""Bytes, FLOPs and weights: each formula is compared with something that counts for itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palladion import KVCache, quantize
from palladion.benchmarks.commands import plan
from palladion.benchmarks.measure.decode_steps import TINY, engines, measure_batch
from palladion.benchmarks.measure.model_shapes import ModelShape, models
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.benchmarks.measure.random_weights import random_parameters
from palladion.kernels import devices
from palladion.kernels.devices import gpus, tpu_chips
from palladion.model.config import LayerKind
from palladion.model.engine import EngineOptions
from palladion.reference.caches import bytes_per_token
from palladion.reference.scheme import Scheme

SCHEMES = (
    "int8",
    "int8-g32",
    "int8-zeros",
    "int4-g32",
    "int4-g64-zeros",
    "int4-g32-minimums",
    "float8_e4m3fn",
    "mxfp4",
)

pytestmark = pytest.mark.usefixtures("small_probes")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama3-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("qwen3-4b", 4.02e9),
        ("gemma2-9b", 9.24e9),
        ("gemma3-4b", 3.88e9),
        ("gpt-oss-20b", 20.9e9),
    ],
)
def test_models_have_as_many_weights_as_their_authors_say(name: str, parameters: float):
    given = models()[name].parameters()
    assert given == (parameters if isinstance(parameters, int) else pytest.approx(parameters, rel=0.003))


def test_a_mixture_of_experts_reads_what_its_tokens_take():
    shape = models()["gpt-oss-20b"]
    assert shape.active_parameters() == pytest.approx(3.6e9, rel=0.01)
    one, many = (shape.step_weight_bytes("mxfp4", batch) for batch in (1, 1000))
    assert one < 0.3 * many
    assert many == pytest.approx(shape.weight_bytes("mxfp4"), rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "scale_dtype"),
    [*((scheme, "float32") for scheme in SCHEMES), ("int4-g32-minimums", "bfloat16"), ("mxfp4", "bfloat16")],
)
def test_bytes_of_a_weight_are_those_of_its_arrays(scheme: str, scale_dtype: str):
    weight = quantize(jnp.ones((128, 48)), scheme, scale_dtype=jnp.dtype(scale_dtype))
    assert Scheme.parse(scheme).nbytes(128, 48, scale_dtype) == weight.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e5m2"])
def test_bytes_of_a_token_are_those_of_the_cache(dtype: str):
    cache = KVCache.dense(2, 3, 16, 64, dtype)
    assert bytes_per_token(3, 64, dtype) == cache.bytes_per_token == cache.nbytes // (2 * 16)


@pytest.mark.parametrize("scheme", ["int4-g32", "float32"])
def test_bytes_of_a_step_are_those_of_the_parameters(scheme: str):
    parameters = random_parameters(TINY, scheme, dtype="bfloat16")
    norms = (2 * TINY.num_layers + 1) * TINY.hidden_size * 4
    frequencies = parameters.inverse_frequencies.nbytes
    assert parameters.bytes_per_step(1) == TINY.weight_bytes(scheme) + norms + frequencies


def compiled(operation: Any, case: Any) -> Any:
    donated, rest = operation.split(case.shapes())
    function = jax.jit(operation.function(case, backend="xla"))
    return function.lower(*((rest,) if donated is None else (donated, rest))).compile()


@pytest.mark.parametrize("name", ["decode_attention", "quantized_matmul"])
def test_operations_cost_what_xla_counts(name: str):
    operation = OPERATIONS[name]
    case = {
        "decode_attention": lambda cases: cases.Case(
            name="x", batch=4, q_heads=8, kv_heads=8, head_dim=128, max_len=128, dtype="float32"
        ),
        "quantized_matmul": lambda cases: cases.Case(
            name="x", rows=64, in_features=512, out_features=768, scheme="int8", dtype="float32"
        ),
    }[name](operation.cases)
    program = compiled(operation, case)
    memory = program.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Lengths, and the log-sum-exp that the call does not return, are not worth counting.
    assert operation.bytes_moved(case) == pytest.approx(moved, rel=0.002)
    counted = program.cost_analysis()["flops"]
    # XLA also counts what is done to each logit and each code.
    assert 0.95 * operation.flops(case) <= counted <= 1.35 * operation.flops(case)


def test_attention_costs_what_its_lengths_and_window_say():
    cases = OPERATIONS["decode_attention"].cases
    case = cases.Case(name="x", batch=2, q_heads=4, kv_heads=2, head_dim=64, max_len=1000, lengths=(10, 600))
    token, queries = 2 * 2 * 64 * 2, 2 * 2 * 4 * 64 * 2
    assert OPERATIONS["decode_attention"].bytes_moved(case) == 610 * token + queries
    assert OPERATIONS["decode_attention"].flops(case) == 610 * 4 * 64 * 4
    windowed = dataclasses.replace(case, sliding_window=100)
    assert OPERATIONS["decode_attention"].bytes_moved(windowed) == 110 * token + queries


def test_a_prompt_costs_its_weights_and_its_pairs():
    shape = ModelShape(
        name="x",
        hidden_size=8,
        intermediate_size=16,
        num_layers=3,
        q_heads=2,
        kv_heads=1,
        head_dim=4,
        vocab_size=32,
        tied_embedding=True,
    )
    layer = 8 * 16 + 8 * 8 + 8 * 32 + 16 * 8
    pairs = sum(i + 1 for i in range(5))
    assert shape.prefill_flops(5) == 2 * 5 * 3 * layer + 2 * 8 * 32 + 3 * pairs * 4 * 2 * 4
    windowed = dataclasses.replace(shape, sliding_window=2, window_period=3)
    pairs_in_window = sum(min(i + 1, 2) for i in range(5))
    expected = 2 * 5 * 3 * layer + 2 * 8 * 32 + (pairs + 2 * pairs_in_window) * 4 * 2 * 4
    assert windowed.prefill_flops(5) == expected


@pytest.mark.parametrize(
    ("name", "kinds", "counts"),
    [
        ("llama3-8b", {"llama3-8b": (None, None, False)}, (32, 0)),
        ("gemma2-9b", {"gemma2-9b-window": (4096, 50.0, False), "gemma2-9b-full": (None, 50.0, False)}, (21, 21)),
        ("gemma3-4b", {"gemma3-4b-window": (1024, None, False), "gemma3-4b-full": (None, None, False)}, (5, 29)),
        ("gpt-oss-20b", {"gpt-oss-20b-window": (128, None, True), "gpt-oss-20b-full": (None, None, True)}, (12, 12)),
    ],
)
def test_attention_is_measured_of_each_kind_of_layer(
    name: str, kinds: dict[str, tuple[int | None, float | None, bool]], counts: tuple[int, int]
):
    """The published configs say which layers have a window: the first, and not every second or sixth."""
    shape = models()[name]
    cases = shape.attention_cases(2, 8192, kv_dtype="int8")
    assert {case.name: (case.sliding_window, case.logits_soft_cap, case.sinks) for case in cases} == kinds
    assert all((case.batch, case.max_len, case.kv_dtype) == (2, 8192, "int8") for case in cases)
    assert (shape.global_layers, shape.num_layers - shape.global_layers) == counts
    assert shape.windows()[0] == shape.sliding_window


def test_a_model_whose_layers_all_have_a_window_has_one_kind():
    shape = dataclasses.replace(models()["llama3-8b"], sliding_window=4096)
    assert [(case.name, case.sliding_window) for case in shape.attention_cases(1, 8192)] == [("llama3-8b-window", 4096)]
    assert shape.global_layers == 0
    assert shape.cache_bytes_per_token("bfloat16", 8192) == shape.cache_bytes_per_token("bfloat16") / 2


def test_the_minimal_llm_has_these_layers():
    config = models()["gemma2-9b"].config(8192)
    assert [kind.windowed for kind in config.layer_kinds] == [True, False]
    assert (config.sliding_window, config.attention_soft_cap, config.activation) == (4096, 50.0, "gelu_tanh")
    assert [kind.windowed for kind in models()["gemma3-4b"].config(8192).layer_kinds] == [True] * 5 + [False]
    assert models()["llama3-8b"].config(8192).layer_kinds == (LayerKind(),)
    with pytest.raises(ValueError, match="model: got gpt-oss-20b; accepted: a decoder without experts and attention"):
        models()["gpt-oss-20b"].config(8192)


def test_a_decode_step_of_such_layers_reads_what_its_windows_show():
    shape = dataclasses.replace(TINY, sliding_window=4, window_period=2, logits_soft_cap=20.0, activation="gelu")
    parameters = random_parameters(shape, "float32", dtype="float32")
    options = EngineOptions(64, "float32", "float32", None, None)
    (engine,) = engines(parameters, shape, options, (1,), prompt=9)
    point = measure_batch(engine, shape, parameters, 9, steps=1, runs=1)
    assert point.steps == engine.steps_per_dispatch
    context = 9 + engine.steps_per_dispatch + (point.steps + 1) / 2
    of_a_layer = bytes_per_token(shape.kv_heads, shape.head_dim, "float32")
    assert point.step_bytes - parameters.bytes_per_step(1) == round(of_a_layer * (context + 4))


def test_a_plan_follows_from_the_datasheet():
    shape, chip = models()["llama3-8b"], gpus()["h100"]
    found = plan.forecast(shape, chip, scheme="bfloat16", kv_dtype="bfloat16", batch=4, context=1000, efficiency=1.0)
    assert found is not None
    assert found.chips == 1
    read = 2 * shape.active_parameters() + 4 * 1000 * 2 * 8 * 128 * 2 * 32
    assert found.step_seconds == pytest.approx(read / 3350e9, rel=1e-6)
    assert found.bound == "memory"
    assert found.memory == 2 * (shape.active_parameters() + 128256 * 4096) + 4 * 1000 * 131072
    many = plan.forecast(shape, chip, scheme="bfloat16", kv_dtype="bfloat16", batch=4000, context=1, mfu=1.0)
    assert many is not None
    assert many.bound == "compute"
    big = plan.forecast(
        models()["llama3-70b"], tpu_chips()["v5e"], scheme="bfloat16", kv_dtype="bfloat16", batch=1, context=1
    )
    assert big is not None
    assert big.chips == 16  # 141 GB, in 14.4 GB of each


def test_the_matrix_rate_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("palladion.kernels.devices._least_seconds", lambda function, x: 1e-3)  # noqa: ARG005
    devices.measured_matrix_rate.cache_clear()
    assert devices.measured_matrix_rate("float32") == pytest.approx(2 * 64**3 / 1e-3)
