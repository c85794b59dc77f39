"""Inputs and problem that products of activations and weights share, whatever the storage of the weights."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.checks import as_array, check, check_number, check_shape, dtype_name
from palladion.kernels.product_shares import exchange_gates, normalize
from palladion.kernels.search_space import TuningKey
from palladion.kernels.sharding import ShardingRule, Share
from palladion.reference.caches import FLOAT_CACHE_DTYPES
from palladion.reference.quantization import Order
from palladion.reference.rms_norm import rms_norm

Normalize = Callable[[jax.Array, jax.Array, float], jax.Array]
"""RMS norm of rows `[rows, in]`, given the norm's weight `[in]` and eps."""


class Inputs(NamedTuple):
    """Arrays of a call, in the shapes that all implementations take.

    Attributes:
      x: `[rows, in]`.
      w: logically `[in, out]`, an array or a QuantizedArray; with a leading `[num_layers]` if there is a layer.
      bias: `[out]` or None.
      layer: int32 scalar or None.
      norm: `[in]` or None.
      residual: `[rows, result_features]` or None.
    """

    x: jax.Array
    w: Any
    bias: jax.Array | None
    layer: jax.Array | None
    norm: jax.Array | None = None
    residual: jax.Array | None = None


def inputs_of(
    x: jax.Array,
    w: Any,
    *,
    bias: jax.Array | None,
    layer: jax.Array | int | None,
    norm: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[Inputs, tuple[int, ...]]:
    """Returns the inputs with all leading dimensions of x merged into one, and those dimensions."""
    x = as_array("x", x)
    check(x.ndim >= 1 and x.shape[-1] >= 1, "x", f"shape {x.shape}", "[..., in] with in of at least 1")
    leading = x.shape[:-1]
    if residual is not None:
        residual = as_array("residual", residual)
        check(residual.shape[:-1] == leading, "residual", f"shape {residual.shape}", f"{(*leading, '...')}, as of x")
        residual = residual.reshape(-1, residual.shape[-1])
    inputs = Inputs(
        x.reshape(-1, x.shape[-1]),
        w,
        None if bias is None else as_array("bias", bias),
        None if layer is None else as_array("layer", layer, "int32"),
        None if norm is None else as_array("norm", norm),
        residual,
    )
    return inputs, leading


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProblem(abc.ABC):
    """A product of activations and weights, without its arrays.

    Attributes:
      rows: rows of x, with all leading dimensions merged.
      in_features: columns of x.
      out_features: columns of w; a gated call returns half as many.
      num_layers: matrices stacked in w; None for a single one.
      x_dtype: dtype of x.
      out_dtype: dtype of the result.
      has_bias: whether a bias is added.
      activation: function applied to the result, or None.
      gated: whether the first half of the channels gates the second.
      norm_eps: epsilon of the RMS norm that is applied to x first; None for no norm.
      has_residual: whether a residual is added to the result.
      order: storage order of w.
    """

    rows: int
    in_features: int
    out_features: int
    num_layers: int | None
    x_dtype: str
    out_dtype: str
    has_bias: bool
    activation: Callable[[jax.Array], jax.Array] | None
    gated: bool
    norm_eps: float | None = None
    has_residual: bool = False
    order: Order = "in_out"

    @classmethod
    def of_call(
        cls,
        inputs: Inputs,
        in_features: int,
        out_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array] | None,
        gated: bool,
        out_dtype: Any,
        norm_eps: float,
        **own: Any,
    ) -> Self:
        """Returns the problem of a call.

        Args:
          inputs: arrays of the call; the weight has been validated.
          in_features: input features of the weight.
          out_features: output features of the weight.
          activation: the caller's argument.
          gated: the caller's argument.
          out_dtype: the caller's argument.
          norm_eps: the caller's argument.
          own: attributes of the subclass, validated.

        Raises:
          ValueError: arrays and options do not fit together; the message names the argument.
        """
        x, w, bias, layer, norm, residual = inputs
        check(in_features >= 1, "w", f"in = {in_features}", "at least 1")
        check(dtype_name(x) in FLOAT_CACHE_DTYPES, "x", x.dtype, ", ".join(FLOAT_CACHE_DTYPES))
        check(x.shape[-1] == in_features, "x", f"shape {x.shape}", f"[..., in] with in = {in_features}, that of w")
        if bias is not None:
            check_shape("bias", bias, (out_features,), "[out]")
            check(jnp.issubdtype(bias.dtype, jnp.floating), "bias", bias.dtype, "a float dtype")
        if norm is not None:
            check_shape("norm", norm, (in_features,), "[in]")
            check(jnp.issubdtype(norm.dtype, jnp.floating), "norm", norm.dtype, "a float dtype")
            check_number("norm_eps", norm_eps, lambda eps: 0 <= eps < np.inf, "a finite number, 0 or more")
        check(activation is None or callable(activation), "activation", activation, "a function of an array, or None")
        check(
            not gated or out_features % 2 == 0, "gated", f"{out_features} channels", "an even number: gates, then ups"
        )
        result = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
        check(result.name in FLOAT_CACHE_DTYPES, "out_dtype", result.name, f"None, {', '.join(FLOAT_CACHE_DTYPES)}")
        if residual is not None:
            features = out_features // 2 if gated else out_features
            check_shape("residual", residual, (x.shape[0], features), "that of the result")
            check(dtype_name(residual) in FLOAT_CACHE_DTYPES, "residual", residual.dtype, ", ".join(FLOAT_CACHE_DTYPES))
        return cls(
            rows=x.shape[0],
            in_features=in_features,
            out_features=out_features,
            num_layers=None if layer is None else w.shape[0],
            x_dtype=dtype_name(x),
            out_dtype=result.name,
            has_bias=bias is not None,
            activation=activation,
            gated=gated,
            norm_eps=None if norm is None else norm_eps,
            has_residual=residual is not None,
            **own,
        )

    def order_unsupported(self, order: Order) -> str | None:
        """Returns why a kernel that reads one storage order cannot run the call, or None.

        Args:
          order: the order that the kernel reads.
        """
        if self.order == order:
            return None
        return (
            f"w must be stored in the order {order!r}, got {self.order!r}; w.with_order({order!r}) converts a "
            "QuantizedArray, once, and a dense weight is transposed and passed with order="
        )

    @property
    def result_features(self) -> int:
        """Columns of the result."""
        return self.out_features // 2 if self.gated else self.out_features

    @property
    def row_by_row(self) -> bool:
        """Whether XLA must normalize each row alone, because its order of summation depends on the number of rows."""
        return False

    @property
    def parts(self) -> int:
        """Number of products per result: two if gated, the gate's and the up's."""
        return 2 if self.gated else 1

    @abc.abstractmethod
    def planned(self) -> LinearProblem:
        """Returns the problem that block sizes are chosen for."""

    @abc.abstractmethod
    def tuning_key(self) -> TuningKey:
        """Returns what block sizes depend on."""

    @abc.abstractmethod
    def weight_dims(self, inputs: Inputs, out: str) -> tuple[list[str], dict[str, int]]:
        """Returns names of the dimensions of each array of the weight, and sizes of the factors along `in`.

        Args:
          inputs: arrays of the call.
          out: name of the output channels; along `in` there are "(pieces piece)".
        """

    def sharding_rule(self, inputs: Inputs) -> ShardingRule:
        """Returns the rule of a product: a device has rows and output channels, or its part of all sums.

        A gated product is sharded along its channels like any other. A device then has gates of some results and ups of
        others, which `exchange_gates` brings together: products are communicated, never weights.
        """
        out, result = ("channels", "result") if self.gated else ("out", "out")
        weight, sizes = self.weight_dims(inputs, out)
        features = "(pieces piece)"
        _, _, bias, layer, norm, residual = inputs
        names = [f"rows {features}", *weight]
        options = ((bias, out), (layer, ""), (norm, features), (residual, f"rows {result}"))
        names += [name for array, name in options if array is not None]
        return ShardingRule(
            names,
            f"rows {result}",
            frozenset({"rows", out}),
            frozenset({"pieces"}),
            {**sizes, out: self.result_features},
            {"result": "channels"} if self.gated else {},
        )

    def run_share(self, run: Callable[[LinearProblem, Inputs], Any], inputs: Inputs, share: Share) -> jax.Array:
        """Multiplies some rows and channels; what is fused with a product waits until sums and gates are whole."""
        gates = share.axes.get("channels", ())
        local = dataclasses.replace(
            self,
            rows=share.of(self.rows, "rows"),
            in_features=share.of(self.in_features, "pieces"),
            out_features=share.of(self.out_features, "out", "channels"),
        )
        if not share.reduced and not gates:
            result: jax.Array = run(local, inputs)
            return result
        x, norm_eps, norm = inputs.x, self.norm_eps, inputs.norm
        if share.reduced and norm_eps is not None and norm is not None:
            x = normalize(x, norm, norm_eps, self.in_features, share.reduced)
            norm_eps = norm = None
        product = dataclasses.replace(
            local,
            out_dtype="float32",
            has_bias=False,
            activation=None,
            gated=False,
            norm_eps=norm_eps,
            has_residual=False,
        )
        y = run(product, Inputs(x, inputs.w, bias=None, layer=inputs.layer, norm=norm))
        y = jax.lax.psum(y, share.reduced) if share.reduced else y
        if inputs.bias is not None:
            y = y + inputs.bias.astype(jnp.float32)
        parts = exchange_gates(y, gates, share.shards["channels"]) if gates else jnp.split(y, self.parts, axis=-1)
        return self.add(inputs.residual, self.finish(parts))

    def finish(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Returns the float32 products (biases included) after activation and gate."""
        first = parts[0] if self.activation is None else self.activation(parts[0])
        return first * parts[1] if self.gated else first

    def plain(self, inputs: Inputs, normalize: Normalize | None = None) -> tuple[Self, Inputs]:
        """Returns the call without norm and residual, x normalized, for kernels that fuse neither.

        Args:
          inputs: arrays of the call.
          normalize: normalizes each row by itself, given x, the norm's weight and eps; None leaves it to XLA.
        """
        x = inputs.x
        if self.norm_eps is not None and inputs.norm is not None:
            if normalize is not None:
                x = normalize(x, inputs.norm, self.norm_eps)
            else:
                by_xla = functools.partial(rms_norm, weight=inputs.norm, eps=self.norm_eps)
                x = jax.lax.map(by_xla, x) if self.row_by_row else by_xla(x)
        problem = dataclasses.replace(self, norm_eps=None, has_residual=False)
        return problem, inputs._replace(x=x, norm=None, residual=None)

    def add(self, residual: jax.Array | None, result: jax.Array) -> jax.Array:
        """Adds the residual, if any, to a result of `finish`, and converts it to the dtype of the result."""
        total = result if residual is None else residual.astype(jnp.float32) + result.astype(jnp.float32)
        return total.astype(self.out_dtype)

    def bytes_beside(self) -> int:
        """Returns the bytes that must move besides the weight: all other inputs and the result, once each."""
        x = self.rows * self.in_features * jnp.dtype(self.x_dtype).itemsize
        result = self.rows * self.result_features * jnp.dtype(self.out_dtype).itemsize
        bias, norm = self.has_bias * self.out_features * 4, (self.norm_eps is not None) * self.in_features * 4
        return x + result * (2 if self.has_residual else 1) + bias + norm

    def flops(self) -> int:
        """Returns the floating-point operations of the product, two per multiply-add."""
        return 2 * self.rows * self.in_features * self.out_features

    def described(self, weight: str, options: Sequence[str] = ()) -> str:
        """Formats shapes, dtypes, the weight's description and the fused operations on one line."""
        fused = [
            "bias" if self.has_bias else "",
            getattr(self.activation, "__name__", "activation") if self.activation else "",
            "gated" if self.gated else "",
            "norm" if self.norm_eps is not None else "",
            "residual" if self.has_residual else "",
            *options,
        ]
        shape = f"{self.rows}x{self.in_features}x{self.out_features}"
        return ", ".join([shape, f"x={self.x_dtype}", weight, f"out={self.out_dtype}", *filter(None, fused)])
