"""Contests of quantized matmul: ours, that of tpu-inference, and tokamax's for float8.

For quantized activations the others' kernels take the maximum of each row from XLA, which is not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp

from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest, with_target_device
from palladion.benchmarks.static.peers.packages import kernels_of
from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.kernels.quantized_matmul.cases import LAYERS, Case

Workload = tuple[Callable[..., Any], tuple[Any, ...]]

FEWEST_TUNED_ROWS: Final = 16
"""The smallest batch for which tpu-inference has tuned block sizes; its engine pads batches to it."""

FEWEST_FLOAT8_ROWS: Final = 128
"""The smallest block of rows that tokamax's float8 kernel takes."""

OWN: Final = "its own blocks"
TUNED: Final = "its blocks for v6e"
SMALL: Final = "blocks of 512 x 2048"
"""Blocks of output and input features that fit into the VMEM of every generation."""


def _ours(case: Case, _: str) -> Workload:
    inputs = case.shapes()

    def function(x: Any, w: Any) -> Any:
        return quantized_matmul(x, w, quantize_x=case.quantize_x, backend="mosaic_tpu")

    return function, (inputs.x, inputs.w)


def _tpu_inference(case: Case, setting: str) -> Workload:
    module = kernels_of("tpu-inference", "kernels.quantized_matmul.kernel")
    sizes = kernels_of("tpu-inference", "kernels.quantized_matmul.tuned_block_sizes")
    rows, tuned = case.rows, None
    if setting != OWN:
        rows = max(rows, FEWEST_TUNED_ROWS)
    if setting == TUNED:
        # It has tuned these layers for int8 on v6e only. Elsewhere these blocks are far better than its default.
        tuned = sizes.TUNED_BLOCK_SIZES[sizes.TunedKey(6, rows, case.out_features, case.in_features, "int8", "int8")]
    elif setting == SMALL:
        tuned = sizes.TunedValue(rows, 512, 2048)

    def function(x: Any, w: Any, scales: Any) -> Any:
        return module.quantized_matmul_kernel(
            x, w, scales, x_q_dtype=jnp.dtype(case.quantize_x or case.dtype), tuned_value=tuned
        )

    weight = jax.ShapeDtypeStruct((case.out_features, case.in_features), jnp.dtype(case.scheme))
    return with_target_device(function), (_activations(case, rows), weight, _scales(case))


def _tokamax_float8(case: Case, _: str) -> Workload:
    module = kernels_of("tokamax", "_src.ops.experimental.fused_fp8_matmul.pallas_mosaic_tpu_kernel")
    rows = max(case.rows, FEWEST_FLOAT8_ROWS)
    depth = module.default_block_k(case.in_features)
    height, width = module.fit_forward_tiles(rows, case.in_features, case.out_features, depth)

    def function(x: Any, w: Any, scales: Any) -> Any:
        return module.fused_fp8_matmul_pallas(x, w, scales, bm=height, bk=depth, bn=width, return_xq=False)

    weight = jax.ShapeDtypeStruct((case.in_features, case.out_features), jnp.float8_e4m3fn)
    return with_target_device(function), (_activations(case, rows), weight, _scales(case))


def _activations(case: Case, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, case.in_features), jnp.dtype(case.dtype))


def _scales(case: Case) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((case.out_features,), jnp.float32)


CONTENDERS: Final = (
    Contender(OURS, "palladion", lambda _: ("",), _ours),
    Contender(
        "tpu-inference quantized_matmul",
        "tpu-inference",
        lambda _: (OWN, TUNED, SMALL),
        _tpu_inference,
    ),
    Contender(
        "tokamax fused_fp8_matmul",
        "tokamax",
        lambda case: (OWN,) if case.quantize_x == "float8_e4m3fn" else (),
        _tokamax_float8,
    ),
)


def _contests() -> Iterator[Contest]:
    schemes = (("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int8"), ("float8_e4m3fn", "float8_e4m3fn"))
    layers = {name: sizes for name, sizes in LAYERS.items() if name.startswith("llama-3-8b-")}
    for (scheme, quantize_x), rows, layer in itertools.product(schemes, (1, 8, 64, 256), layers):
        in_features, out_features = layers[layer]
        case = Case(
            name=f"{layer}-{rows}-{scheme}-by-{quantize_x or 'bfloat16'}",
            rows=rows,
            in_features=in_features,
            out_features=out_features,
            scheme=scheme,
            quantize_x=quantize_x,
        )
        yield Contest("quantized_matmul", case, CONTENDERS)


CONTESTS: Final = tuple(_contests())
