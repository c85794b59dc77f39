"""Names quantized_matmul workloads for tests, compile checks, the tuner and benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.linear import Inputs
from palladion.kernels.quantized_matmul.problem import Problem
from palladion.reference.quantization import Order
from palladion.reference.quantizers import quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A workload: the shapes, dtypes and options of a call.

    Attributes:
      name: letters, digits, dashes.
      rows: rows of x.
      in_features: columns of x.
      out_features: columns of w, gate and up together where gated.
      scheme: how w is quantized.
      dtype: dtype of x.
      scale_dtype: dtype of scales and minimums.
      out_dtype: dtype of the result; None means that of x.
      bias: whether a bias is added.
      activation: function applied to the result, or None.
      gated: whether the first half of the channels gates the second.
      norm: whether x is normalized first.
      residual: whether a residual is added to the result.
      quantize_x: dtype that x is quantized to, or None.
      num_layers: matrices stacked in w, of which the last is used; None for a single matrix.
      order: storage order of w; None means that of the platform traced for.
    """

    name: str
    rows: int
    in_features: int
    out_features: int
    scheme: str
    dtype: str = "bfloat16"
    scale_dtype: str = "float32"
    out_dtype: str | None = None
    bias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    gated: bool = False
    norm: bool = False
    residual: bool = False
    quantize_x: str | None = None
    num_layers: int | None = None
    order: Order | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `quantized_matmul` that are not arrays."""
        return {name: getattr(self, name) for name in ("activation", "gated", "quantize_x", "out_dtype")}

    def shapes(self) -> Inputs:
        """Returns the shapes and dtypes of the inputs: enough to compile."""
        return jax.eval_shape(lambda: _inputs(self, jax.random.key(0)))

    def problem(self) -> Problem:
        """Returns the `Problem` of a call with this case's inputs and options."""
        problems: list[Problem] = []
        jax.eval_shape(lambda inputs: problems.append(Problem.of(inputs, **self.options)), self.shapes())
        return problems[0]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns normal-distributed inputs: weight columns of unit norm, NaN in all layers but the last."""
    inputs = _inputs(case, jax.random.key(seed))
    if case.num_layers is None:
        return inputs
    dead = np.arange(case.num_layers) < case.num_layers - 1
    scales = jnp.where(dead[:, None, None], jnp.nan, inputs.w.scales)
    return inputs._replace(w=dataclasses.replace(inputs.w, scales=scales))


def _inputs(case: Case, key: jax.Array) -> Inputs:
    x_key, w_key, bias_key, norm_key, residual_key = jax.random.split(key, 5)
    features = case.out_features // 2 if case.gated else case.out_features
    stacked = () if case.num_layers is None else (case.num_layers,)
    weights = jax.random.normal(w_key, (*stacked, case.in_features, case.out_features)) * case.in_features**-0.5
    return Inputs(
        x=jax.random.normal(x_key, (case.rows, case.in_features)).astype(case.dtype),
        w=quantize(weights, case.scheme, scale_dtype=jnp.dtype(case.scale_dtype), order=case.order),
        bias=jax.random.normal(bias_key, (case.out_features,)) if case.bias else None,
        layer=None if case.num_layers is None else jnp.int32(case.num_layers - 1),
        norm=1 + 0.1 * jax.random.normal(norm_key, (case.in_features,)) if case.norm else None,
        residual=jax.random.normal(residual_key, (case.rows, features)).astype(case.dtype) if case.residual else None,
    )


def _llama_3_8b(rows: int, scheme: str) -> tuple[Case, ...]:
    """Returns the linear layers of Llama-3-8B."""
    names_and_shapes = {"qkv": (4096, 6144), "output": (4096, 4096), "gate-up": (4096, 28672), "down": (14336, 4096)}
    return tuple(
        Case(
            name=f"llama-3-8b-{name}-{rows}-{scheme}",
            rows=rows,
            in_features=in_features,
            out_features=out_features,
            scheme=scheme,
            gated=name == "gate-up",
            activation=jax.nn.silu if name == "gate-up" else None,
        )
        for name, (in_features, out_features) in names_and_shapes.items()
    )


def _smollm2(rows: int) -> tuple[Case, ...]:
    """Returns the linear layers of SmolLM2-135M as its Q4_1 file has them, stacked for a loop over layers."""
    layers: dict[str, Any] = {"dtype": "float32", "num_layers": 30, "scheme": "int4-g32-minimums", "rows": rows}
    return (
        Case(name=f"smollm2-qkv-{rows}", in_features=576, out_features=960, **layers),
        Case(
            name=f"smollm2-gate-up-{rows}",
            in_features=576,
            out_features=3072,
            gated=True,
            activation=jax.nn.silu,
            **layers,
        ),
        Case(name=f"smollm2-down-{rows}", in_features=1536, out_features=576, **layers),
        Case(
            name=f"smollm2-head-{rows}",
            rows=rows,
            in_features=576,
            out_features=49152,
            scheme="int8-g32",
            dtype="float32",
        ),
    )


MODELS: Final = (
    *_llama_3_8b(1, "int8"),
    *_llama_3_8b(1, "int4-g32"),
    *_llama_3_8b(16, "int4-g128-zeros"),
    Case(name="llama-3-8b-head-1", rows=1, in_features=4096, out_features=128256, scheme="int8"),
    Case(name="llama-3-8b-prefill", rows=512, in_features=4096, out_features=6144, scheme="int4-g128"),
    *_smollm2(1),
    *_smollm2(16),
    *_smollm2(256),
)
"""The workloads of real models, which are compiled, tuned and measured."""

_SMALL: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "int8": ("int8", {}),
    "int8-group": ("int8-g32", {"dtype": "float32"}),
    "int8-zeros": ("int8-zeros", {"bias": True}),
    "int8-minimums": ("int8-g64-minimums", {"dtype": "float32", "rows": 17}),
    "int4": ("int4", {"scale_dtype": "bfloat16"}),
    "int4-group": ("int4-g32", {"dtype": "float32", "bias": True}),
    "int4-large-group": ("int4-g128", {"activation": jax.nn.gelu}),
    "int4-minimums": ("int4-g32-minimums", {"dtype": "float32", "num_layers": 3}),
    "int4-zeros": ("int4-g64-zeros", {"out_dtype": "float32"}),
    "float16": ("int4-g32-minimums", {"dtype": "float16", "scale_dtype": "float16"}),
    "gated": ("int4-g32", {"gated": True, "activation": jax.nn.silu, "bias": True, "dtype": "float32"}),
    "gated-many": ("int8", {"gated": True, "activation": jax.nn.gelu, "rows": 65}),
    "many-rows": ("int4-g32-minimums", {"rows": 300, "dtype": "float32"}),
    "one-row": ("int8", {"rows": 1, "bias": True, "activation": jax.nn.relu}),
    "small-group": ("int8-g16", {}),
    "small-group-int4": ("int4-g16", {"dtype": "float32"}),
    "gated-odd": ("int4-g64", {"gated": True, "activation": jax.nn.silu, "bias": True, "out_features": 400}),
    "float8": ("float8_e4m3fn", {}),
    "float8-e5m2": ("float8_e5m2", {"scale_dtype": "bfloat16", "dtype": "float32"}),
    "float8-activations": ("float8_e4m3fn", {"quantize_x": "float8_e4m3fn"}),
    "mxfp4": ("mxfp4", {"dtype": "float32"}),
    "mxfp4-many-rows": ("mxfp4", {"rows": 100, "bias": True}),
    "norm-residual": ("int4-g32", {"norm": True, "residual": True, "bias": True, "dtype": "float32"}),
    "norm-residual-one-row": ("int4-g64-zeros", {"norm": True, "residual": True, "rows": 1, "bias": True}),
    "norm-gated-one-row": ("int8", {"norm": True, "rows": 1, "gated": True, "activation": jax.nn.silu}),
    "norm-residual-layer": (
        "int4-g32-minimums",
        {"norm": True, "residual": True, "rows": 1, "dtype": "float32", "num_layers": 3},
    ),
    "norm-residual-float8": (
        "float8_e4m3fn",
        {"norm": True, "residual": True, "quantize_x": "float8_e4m3fn", "rows": 1},
    ),
    "int8-activations": ("int8", {"quantize_x": "int8"}),
    "int4-int8-activations": ("int4-g32", {"quantize_x": "int8", "dtype": "float32"}),
}

TESTS: Final = (
    *(
        Case(**{"name": name, "rows": 3, "in_features": 384, "out_features": 512, "scheme": scheme, **changes})
        for name, (scheme, changes) in _SMALL.items()
    ),
    # Sizes that divide no block.
    Case(name="odd-in", rows=5, in_features=176, out_features=200, scheme="int8", dtype="float32"),
    Case(name="odd-out", rows=2, in_features=160, out_features=333, scheme="int4-g32", dtype="float32"),
    Case(name="wide-out", rows=1, in_features=64, out_features=70_000, scheme="int8", dtype="float32"),
)
"""Small workloads that cover every option; tests compare them with the oracle."""


LAYERS: Final = {
    "llama-3-8b-qkv": (4096, 6144),
    "llama-3-8b-output": (4096, 4096),
    "llama-3-8b-gate-up": (4096, 28672),
    "llama-3-8b-down": (14336, 4096),
    "llama-3-70b-qkv": (8192, 10240),
    "llama-3-70b-output": (8192, 8192),
    "llama-3-70b-gate-up": (8192, 57344),
    "llama-3-70b-down": (28672, 8192),
}
"""The (in, out) of linear layers."""

SCHEMES: Final = (
    ("int8", None),
    ("int8-g128", None),
    ("int8", "int8"),
    ("int4", None),
    ("int4-g32", None),
    ("int4-g128", None),
    ("int4-g128-zeros", None),
    ("int4-g32-minimums", None),
    ("int4-g128", "int8"),
    ("float8_e4m3fn", None),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("mxfp4", None),
)
"""Pairs of a weight scheme and a `quantize_x`."""


def _shapes() -> Iterator[Case]:
    """Yields each layer in each scheme with 1 to 256 rows."""
    for (layer, (in_features, out_features)), (scheme, quantize_x), rows in itertools.product(
        LAYERS.items(), SCHEMES, (1, 8, 16, 64, 256)
    ):
        yield Case(
            name=f"{layer}-{scheme}-by-{quantize_x or 'bfloat16'}-{rows}",
            rows=rows,
            in_features=in_features,
            out_features=out_features,
            scheme=scheme,
            scale_dtype="bfloat16",
            quantize_x=quantize_x,
        )


SHAPES: Final = tuple(_shapes())
"""A grid of shapes that shows where a kernel is near the bandwidth and where it is not."""
