"""The problem of a matmul call: shapes, dtypes and options, validated before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from palladion.kernels.checks import check, check_layer, dtype_name
from palladion.kernels.linear import Inputs, LinearProblem
from palladion.kernels.search_space import TuningKey
from palladion.reference.caches import FLOAT_CACHE_DTYPES
from palladion.reference.quantization import ORDERS, Order, in_axis, out_axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(LinearProblem):
    """A matmul call without its arrays; `LinearProblem` has the other attributes.

    Attributes:
      w_dtype: dtype of the weight.
    """

    w_dtype: str

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        *,
        activation: Callable[[jax.Array], jax.Array] | None,
        gated: bool,
        out_dtype: Any,
        norm_eps: float,
        order: Order = "in_out",
    ) -> Problem:
        """Describes a call.

        Raises:
          ValueError: arrays and options do not fit each other; the message names the argument.
        """
        w, layer = inputs.w, inputs.layer
        check(order in ORDERS, "order", order, " or ".join(map(repr, ORDERS)))
        axes = "in, out" if order == "in_out" else "out, in"
        if layer is None:
            check(w.ndim == 2, "w", f"shape {w.shape}", f"[{axes}]; with a leading dimension say which by layer=")
        else:
            check(w.ndim == 3, "w", f"shape {w.shape}", f"[num_layers, {axes}] with layer=")
            check_layer(layer, w.shape[0])
        accepted = ", ".join(FLOAT_CACHE_DTYPES)
        check(dtype_name(w) in FLOAT_CACHE_DTYPES, "w", w.dtype, f"{accepted}; quantized_matmul takes narrower ones")
        return cls.of_call(
            inputs,
            w.shape[in_axis(order)],
            w.shape[out_axis(order)],
            activation=activation,
            gated=gated,
            out_dtype=out_dtype,
            norm_eps=norm_eps,
            w_dtype=dtype_name(w),
            order=order,
        )

    def weight_dims(self, inputs: Inputs, out: str) -> tuple[list[str], dict[str, int]]:
        """Returns names of the dimensions of w, in its order; any part of `in` may be summed apart."""
        layers = "" if inputs.layer is None else "num_layers "
        axes = f"(pieces piece) {out}" if self.order == "in_out" else f"{out} (pieces piece)"
        return [layers + axes], {"pieces": self.in_features, "piece": 1}

    def bytes_moved(self) -> int:
        """Returns the bytes that must move between memory and chip: all inputs and the result, once each."""
        return self.in_features * self.out_features * jnp.dtype(self.w_dtype).itemsize + self.bytes_beside()

    def planned(self) -> Problem:
        """Returns the problem by which block sizes are chosen."""
        return self

    def tuning_key(self) -> TuningKey:
        """Returns what block sizes depend on."""
        gated = " gated" if self.gated else ""
        return TuningKey(
            kind=f"{self.x_dtype} x {self.w_dtype} to {self.out_dtype}{gated}, {self.order}",
            sizes={"rows": self.rows, "in": self.in_features, "out": self.out_features},
        )

    def __str__(self) -> str:
        return self.described(f"w={self.w_dtype} {self.order}")
