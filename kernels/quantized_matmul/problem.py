"""What a quantized_matmul call asks for: shapes, dtypes and options, validated before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.checks import check, check_layer, check_shape, dtype_name
from palladion.kernels.tuning import TuningKey
from palladion.reference.caches import FLOAT_CACHE_DTYPES as FLOAT_DTYPES
from palladion.reference.quantization import CODE_DTYPE, QuantizedArray, Scheme
from palladion.reference.quantized_matmul import NORM_EPS
from palladion.reference.rms_norm import rms_norm

ACTIVATION_FORMATS: Final = {
    "int8": ("int8", "int4"),
    "float8_e4m3fn": ("float8_e4m3fn", "float8_e5m2"),
}
"""To what activations can be quantized on the fly, and the weight formats that go with it."""

INVARIANT_ROWS: Final = 64
"""For which block sizes are chosen where they must suit any number of rows: blocks of so many are multiplied in about
the time of one row while memory is what they wait for, and still share what they read where rows are many."""


class Inputs(NamedTuple):
    """The arrays of a call, in the shapes that every implementation takes.

    Attributes:
      x: `[rows, in]`.
      w: a QuantizedArray `[in, out]`; with a leading `[num_layers]` where there is a layer.
      bias: `[out]` or None.
      layer: int32 scalar or None.
      norm: `[in]` or None.
      residual: `[rows, result_features]` or None.
    """

    x: jax.Array
    w: QuantizedArray
    bias: jax.Array | None
    layer: jax.Array | None
    norm: jax.Array | None = None
    residual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A quantized_matmul call without its arrays.

    Attributes:
      rows: rows of x, all of its leading dimensions together.
      in_features: columns of x.
      out_features: columns of w; a gated call returns half of them.
      num_layers: matrices stacked in w; None where it is one.
      scheme: how w is quantized.
      scale_dtype: dtype of scales and minimums.
      x_dtype: dtype of x.
      out_dtype: dtype of the result.
      has_bias: whether a bias is added.
      activation: applied to the result, or None.
      gated: whether the first half of the channels gates the second.
      quantize_x: what x is quantized to, one scale per row, or None.
      batch_invariant: whether the result of a row must not depend on how many others there are.
      norm_eps: what is added to the mean square of a row that is normalized first; None where none is.
      has_residual: whether something is added to the result.
    """

    rows: int
    in_features: int
    out_features: int
    num_layers: int | None
    scheme: Scheme
    scale_dtype: str
    x_dtype: str
    out_dtype: str
    has_bias: bool
    activation: Callable[[jax.Array], jax.Array] | None
    gated: bool
    quantize_x: str | None
    batch_invariant: bool = False
    norm_eps: float | None = None
    has_residual: bool = False

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        *,
        activation: Callable[[jax.Array], jax.Array] | None,
        gated: bool,
        quantize_x: str | None,
        out_dtype: Any,
        batch_invariant: bool = False,
        norm_eps: float = NORM_EPS,
    ) -> Problem:
        """Describes a call; raises ValueError, naming the argument, where its arrays and options do not go together."""
        x, w, bias, layer, norm, residual = inputs
        in_features, out_features = _check_weight(w, layer)
        check(dtype_name(x) in FLOAT_DTYPES, "x", x.dtype, ", ".join(FLOAT_DTYPES))
        check(x.shape[-1] == in_features, "x", f"shape {x.shape}", f"[..., in] with in = {in_features}, that of w")
        if bias is not None:
            check_shape("bias", bias, (out_features,), "[out]")
            check(jnp.issubdtype(bias.dtype, jnp.floating), "bias", bias.dtype, "a float dtype")
        if norm is not None:
            check_shape("norm", norm, (in_features,), "[in]")
            check(jnp.issubdtype(norm.dtype, jnp.floating), "norm", norm.dtype, "a float dtype")
            check(norm_eps >= 0, "norm_eps", norm_eps, "0 or more")
        check(activation is None or callable(activation), "activation", activation, "a function of an array, or None")
        check(
            not gated or out_features % 2 == 0, "gated", f"{out_features} channels", "an even number: gates, then ups"
        )
        if quantize_x is not None:
            check(quantize_x in ACTIVATION_FORMATS, "quantize_x", quantize_x, f"None, {', '.join(ACTIVATION_FORMATS)}")
            formats = ACTIVATION_FORMATS[quantize_x]
            check(
                w.scheme.format in formats, "quantize_x", f"{quantize_x} with {w.scheme} weights", " or ".join(formats)
            )
        result = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
        check(result.name in FLOAT_DTYPES, "out_dtype", result.name, f"None, {', '.join(FLOAT_DTYPES)}")
        if residual is not None:
            features = out_features // 2 if gated else out_features
            check_shape("residual", residual, (x.shape[0], features), "that of the result")
            check(dtype_name(residual) in FLOAT_DTYPES, "residual", residual.dtype, ", ".join(FLOAT_DTYPES))
        return cls(
            rows=x.shape[0],
            in_features=in_features,
            out_features=out_features,
            num_layers=None if layer is None else w.shape[0],
            scheme=w.scheme,
            scale_dtype=dtype_name(w.scales),
            x_dtype=dtype_name(x),
            out_dtype=result.name,
            has_bias=bias is not None,
            activation=activation,
            gated=gated,
            quantize_x=quantize_x,
            batch_invariant=batch_invariant,
            norm_eps=None if norm is None else norm_eps,
            has_residual=residual is not None,
        )

    @property
    def result_features(self) -> int:
        """Columns of the result."""
        return self.out_features // 2 if self.gated else self.out_features

    @property
    def group_size(self) -> int:
        """Weights along `in` that share a scale; all of them in a per-channel scheme."""
        return self.scheme.group_size or self.in_features

    @property
    def groups(self) -> int:
        """Scales of one output channel."""
        return self.scheme.groups(self.in_features)

    @property
    def dot_dtype(self) -> str:
        """In what weights are multiplied: that of x, unless scaled weights rounded to it would show in the result."""
        rounds = self.scheme.group_size is not None or self.scheme.offset == "minimums"
        return "float32" if rounds and self.out_dtype == "float32" else self.x_dtype

    @property
    def parts(self) -> int:
        """Products that a result needs: the gate's and the up's where gated."""
        return 2 if self.gated else 1

    def finish(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Activation and gate on the float32 products, biases added already."""
        first = parts[0] if self.activation is None else self.activation(parts[0])
        return first * parts[1] if self.gated else first

    def plain(self, inputs: Inputs) -> tuple[Problem, Inputs]:
        """The call without norm and residual: for a kernel that leaves both to XLA, which normalizes x here."""
        x = inputs.x
        if self.norm_eps is not None and inputs.norm is not None:
            x = rms_norm(x, inputs.norm, self.norm_eps)
        problem = dataclasses.replace(self, norm_eps=None, has_residual=False)
        return problem, inputs._replace(x=x, norm=None, residual=None)

    def add(self, residual: jax.Array | None, result: jax.Array) -> jax.Array:
        """The residual, where there is one, added to what `finish` has returned, in the dtype of the result."""
        whole = result if residual is None else residual.astype(jnp.float32) + result.astype(jnp.float32)
        return whole.astype(self.out_dtype)

    def bytes_moved(self) -> int:
        """Bytes that must move between memory and chip: all inputs, scales among them, and the result, once each."""
        weight = self.scheme.nbytes(self.in_features, self.out_features, self.scale_dtype)
        x = self.rows * self.in_features * jnp.dtype(self.x_dtype).itemsize
        result = self.rows * self.result_features * jnp.dtype(self.out_dtype).itemsize
        bias, norm = self.has_bias * self.out_features * 4, (self.norm_eps is not None) * self.in_features * 4
        return weight + x + result * (2 if self.has_residual else 1) + bias + norm

    def flops(self) -> int:
        """Floating-point operations of the product, 2 for each multiply-add."""
        return 2 * self.rows * self.in_features * self.out_features

    def planned(self) -> Problem:
        """The problem by which block sizes are chosen: where other rows must not matter, one of `INVARIANT_ROWS`."""
        return dataclasses.replace(self, rows=INVARIANT_ROWS, batch_invariant=False) if self.batch_invariant else self

    def tuning_key(self) -> TuningKey:
        """What block sizes depend on."""
        x = self.x_dtype if self.quantize_x is None else f"{self.x_dtype} as {self.quantize_x}"
        gated = " gated" if self.gated else ""
        return TuningKey(
            kind=f"{x} x {self.scheme} with {self.scale_dtype} scales to {self.out_dtype}{gated}",
            sizes={"rows": self.rows, "in": self.in_features, "out": self.out_features},
        )

    def __str__(self) -> str:
        options = [
            "bias" if self.has_bias else "",
            getattr(self.activation, "__name__", "activation") if self.activation else "",
            "gated" if self.gated else "",
            "norm" if self.norm_eps is not None else "",
            "residual" if self.has_residual else "",
            f"quantize_x={self.quantize_x}" if self.quantize_x else "",
            "batch_invariant" if self.batch_invariant else "",
        ]
        shape = f"{self.rows}x{self.in_features}x{self.out_features}"
        described = [
            shape,
            f"x={self.x_dtype}",
            f"w={self.scheme}",
            f"scales={self.scale_dtype}",
            f"out={self.out_dtype}",
        ]
        return ", ".join([*described, *filter(None, options)])


def _check_weight(w: Any, layer: jax.Array | None) -> tuple[int, int]:
    """Checks that a QuantizedArray is whole; returns in and out."""
    check(isinstance(w, QuantizedArray), "w", type(w).__name__, "a QuantizedArray; palladion.quantize makes one")
    if layer is None:
        check(w.values.ndim == 2, "w", f"shape {w.shape}", "[in, out]; with a leading dimension say which by layer=")
    else:
        check(w.values.ndim == 3, "w", f"shape {w.shape}", "[num_layers, in, out] with layer=")
        check_layer(layer, w.values.shape[0])
    check(
        w.values.dtype == CODE_DTYPE[w.scheme.format], "w.values", w.values.dtype, CODE_DTYPE[w.scheme.format].__name__
    )
    *leading, in_features, out_features = w.shape
    shape = (*leading, w.scheme.groups(in_features), out_features)
    parts = (("scales", True), ("zeros", w.scheme.offset == "zeros"), ("minimums", w.scheme.offset == "minimums"))
    for name, needed in parts:
        part: jax.Array | None = getattr(w, name)
        check((part is not None) == needed, f"w.{name}", part is not None, f"{needed} for {w.scheme}")
        if part is not None:
            check_shape(f"w.{name}", part, shape, "[groups, out]")
    return in_features, out_features
