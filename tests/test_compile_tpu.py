"""The real TPU compiler compiles every TPU kernel, for chips that need not be present."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiling import SAME_BUT_FOR_SIZES

from palladion import KVCache, append_kv, append_qkv, decode_attention, quantized_matmul
from palladion.benchmarks.static import workloads
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.append_kv.cases import Case as AppendCase
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.kernels.tpu_layout import minor_axes

pytestmark = pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")

Compilable = tuple[Callable[..., Any], tuple[Any, ...], int]
"""A function, its arguments, and the size of the large argument, which must not be copied on its way to the kernel."""


def attention(case: AttentionCase) -> Compilable:
    options = case.options | {"backend": "pallas", "return_lse": True}
    shapes = case.shapes()
    return lambda inputs: decode_attention(**inputs._asdict(), **options), (shapes,), shapes.k.size


def matmul(case: MatmulCase) -> Compilable:
    options = case.options | {"backend": "pallas"}
    shapes = case.shapes()

    def call(inputs: Any) -> Any:
        return quantized_matmul(**inputs._asdict(), **options)

    return call, (shapes,), shapes.w.values.size


def append(case: AppendCase) -> Compilable:
    """Returns appends to every layer in turn, as in the model; neither cache nor scales may be copied."""
    inputs = case.shapes()

    def call(cache: KVCache, k: jax.Array, v: jax.Array, lengths: jax.Array) -> KVCache:
        def step(layer: jax.Array | None, cache: KVCache) -> KVCache:
            return append_kv(cache, k, v, lengths, layer=layer, backend="pallas")

        return step(None, cache) if inputs.layer is None else jax.lax.fori_loop(0, case.num_layers, step, cache)

    smallest = inputs.cache.k if inputs.cache.k_scale is None else inputs.cache.k_scale
    return jax.jit(call, donate_argnums=0), inputs[:4], smallest.size


def append_joined(case: AppendCase) -> Compilable:
    """Returns an append of a joined projection; neither cache nor scales may be copied."""
    inputs = case.shapes()

    def call(cache: KVCache, rest: Any) -> Any:
        return append_qkv(**rest._replace(cache=cache)._asdict(), backend="pallas")

    smallest = inputs.cache.k if inputs.cache.k_scale is None else inputs.cache.k_scale
    return jax.jit(call, donate_argnums=0), (inputs.cache, inputs._replace(cache=None)), smallest.size


def by_its_row(operation: str, case: Any) -> Compilable:
    """Returns the kernel of an operation's TPU row; the largest input must not be copied on its way to it."""
    workload = workloads.load(workloads.WorkloadName(operation, case.name), "mosaic_tpu")
    return workload.function, workload.arguments, max(leaf.size for leaf in jax.tree.leaves(workload.arguments))


CALLS: dict[str, Callable[[Any], Compilable]] = {"decode_attention": attention, "quantized_matmul": matmul}
CALLS |= {"append_kv": append, "append_qkv": append_joined}
"""Calls as models make them; kernels of other operations are called by their rows."""


def compiled_cases() -> Iterator[tuple[str, Callable[[], Compilable]]]:
    """Yields a call for each case of a real model that a TPU kernel takes."""
    for operation in workloads.operations("tpu"):
        for case in workloads.models(operation):
            if operation == "quantized_matmul" and case.name in SAME_BUT_FOR_SIZES:
                continue
            make = CALLS.get(operation, functools.partial(by_its_row, operation))
            if workloads.row(operation, "mosaic_tpu").unsupported(case.problem()) is None:
                yield f"{operation}-{case.name}", functools.partial(make, case)


OPERATIONS = dict(compiled_cases())
"""Calls compiled for v6e: the shapes of real models."""

ON_OTHER_CHIPS = {
    "append_kv-llama-3-8b-int8": ("v4", "v5e", "v5p", "v7x"),
    "append_kv-gpt-oss-20b-float8": ("v5e", "v5p"),
    "decode_attention-llama-3-8b-layers": ("v4", "v5e", "v5p", "v7x"),
    "decode_attention-llama-3-8b-float32": ("v4", "v7x"),
    "decode_attention-llama-3-8b-verify": ("v5e", "v5p"),
    "decode_attention-llama-3-8b-prefill": ("v4", "v5e", "v5p", "v7x"),
    "decode_attention-llama-3-8b-int8": ("v4", "v5p"),
    "decode_attention-llama-3-8b-float8": ("v4", "v5e", "v5p", "v7x"),
    "decode_attention-llama-3-8b-paged": ("v5e", "v7x"),
    "decode_attention-llama-3-8b-paged-int8": ("v4", "v5e", "v5p", "v7x"),
    "decode_attention-smollm2-135m": ("v4", "v5e", "v5p", "v7x"),
    "decode_attention-gpt-oss-20b": ("v4", "v7x"),
    "quantized_matmul-llama-3-8b-qkv-1-int8": ("v5p", "v7x"),
    "quantized_matmul-llama-3-8b-gate-up-1-int4-g32": ("v4", "v5e", "v5p", "v7x"),
}
"""Calls compiled for other chips, too: each gets every dtype and layout; test_static_figures.py compiles more."""


COPIED = {f"quantized_matmul-smollm2-down-{rows}" for rows in (1, 256)}
"""Weights that XLA transposes: 576 channels would be padded to 640 lanes, so XLA stores them the other way round."""


def sizes(compiled: Any) -> dict[str, int]:
    """Returns the size of the largest result of each kind of instruction, except kernels and program arguments."""
    largest: dict[str, int] = {}
    for dimensions, kind in re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", compiled.as_text()):
        size = 1
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        if kind not in ("parameter", "bitcast", "custom-call", "get-tuple-element"):
            largest[kind] = max(largest.get(kind, 0), size)
    return largest


@pytest.mark.parametrize(
    ("name", "chip"),
    [pytest.param(name, "v6e", id=f"{name}-v6e") for name in OPERATIONS]
    + [pytest.param(name, chip, id=f"{name}-{chip}") for name, chips in ON_OTHER_CHIPS.items() for chip in chips],
)
def test_compiles(name: str, chip: str):
    function, arguments, large = OPERATIONS[name]()
    compiled = tpu_compiler.compile_for_tpu(function, *arguments, chip=chip)
    assert "tpu_custom_call" in compiled.as_text()
    copied = {kind: size for kind, size in sizes(compiled).items() if size >= large}
    assert set(copied) == ({"copy"} if name in COPIED else set())


def test_copies_would_be_seen():
    function, (shapes,), large = attention(attention_cases.TESTS[0])
    compiled = tpu_compiler.compile_for_tpu(lambda inputs: function(inputs._replace(k=2 * inputs.k)), shapes)
    assert max(sizes(compiled).values()) >= large


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_layouts_are_known(chip: str):
    dense = [(3, 6, 8, 2048, 128), (6, 8, 2048, 64), (4, 2, 300, 128), (4, 2, 300, 64), (3, 8, 128, 2000, 64)]
    paged = [(99, 8, 16, 128), (256, 8, 16, 64), (40, 8, 64, 64), (8, 3, 128, 80)]
    scales = [(2, 4, 3, 2048), (4, 3, 2048), (300, 8, 16)]
    caches = dense + paged + scales
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in caches for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)]
    compiled = tpu_compiler.compile_for_tpu(lambda *xs: [x[(0,) * x.ndim] for x in xs], *shapes, chip=chip)
    layouts = [layout.layout.major_to_minor for layout in jax.tree.leaves(compiled.input_formats)]
    assert [order[-2:] for order in layouts] == [minor_axes(x.shape, x.dtype) for x in shapes]


def test_unknown_chips():
    with pytest.raises(ValueError, match="chip: got 'v3'; accepted: v4, v5e, v5p, v6e, v7x"):
        tpu_compiler.device("v3")
