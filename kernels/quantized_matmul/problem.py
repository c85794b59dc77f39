"""Describes a quantized_matmul call: shapes, dtypes and options, validated before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import jax

from palladion.kernels.checks import check, check_layer, dtype_name
from palladion.kernels.linear import Inputs, LinearProblem
from palladion.kernels.search_space import TuningKey
from palladion.reference.quantization import QuantizedArray, check_parts
from palladion.reference.quantized_matmul import NORM_EPS
from palladion.reference.scheme import PACK_BLOCK, Scheme

ACTIVATION_FORMATS: Final = {
    "int8": ("int8", "int4"),
    "float8_e4m3fn": ("float8_e4m3fn", "float8_e5m2"),
}
"""The values of `quantize_x`, and the weight formats that each accepts."""

INVARIANT_ROWS: Final = 64
"""Number of rows that block sizes are chosen for where they must not depend on the rows: a block of 64 takes about as
long as one row while memory is the bound, and still reads weights once for many rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(LinearProblem):
    """A quantized_matmul call without its arrays; `LinearProblem` lists the attributes that both products share.

    Attributes:
      scheme: how w is quantized.
      scale_dtype: dtype of scales and minimums.
      quantize_x: dtype that x is quantized to, one scale per row, or None.
      batch_invariant: whether a row's result must not depend on the other rows.
    """

    scheme: Scheme
    scale_dtype: str
    quantize_x: str | None
    batch_invariant: bool = False

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
        """Returns the problem of a call, or raises ValueError that names an argument which does not agree."""
        w = inputs.w
        sizes = _check_weight(w, inputs.layer)
        problem = cls.of_call(
            inputs,
            *sizes,
            activation=activation,
            gated=gated,
            out_dtype=out_dtype,
            norm_eps=norm_eps,
            scheme=w.scheme,
            scale_dtype=dtype_name(w.scales),
            quantize_x=quantize_x,
            batch_invariant=batch_invariant,
            order=w.order,
        )
        if quantize_x is not None:
            check(quantize_x in ACTIVATION_FORMATS, "quantize_x", quantize_x, f"None, {', '.join(ACTIVATION_FORMATS)}")
            formats = ACTIVATION_FORMATS[quantize_x]
            check(
                w.scheme.format in formats, "quantize_x", f"{quantize_x} with {w.scheme} weights", " or ".join(formats)
            )
        return problem

    def weight_dims(self, inputs: Inputs, out: str) -> tuple[list[str], dict[str, int]]:
        """Returns names of the dimensions of codes, scales and offsets; a piece has whole groups and blocks."""
        layers = "" if inputs.layer is None else "num_layers "
        scheme, group = self.scheme, "all_in" if self.groups == 1 else "(pieces groups)"
        piece = math.lcm(scheme.group_size or 1, PACK_BLOCK if scheme.packed else 1)
        pieces = self.in_features // piece

        def stored(along_in: str) -> str:
            return layers + (f"{along_in} {out}" if self.order == "in_out" else f"{out} {along_in}")

        names = [stored("(pieces codes)"), stored(group), *([] if scheme.offset == "none" else [stored(group)])]
        codes = piece // 2 if scheme.packed else piece
        sizes = {"pieces": pieces, "piece": piece, "codes": codes, "groups": max(1, self.groups // pieces)}
        return names, sizes

    @property
    def group_size(self) -> int:
        """Number of weights along `in` that share a scale; all of them in a per-channel scheme."""
        return self.scheme.group_size or self.in_features

    @property
    def groups(self) -> int:
        """Number of scales of an output channel."""
        return self.scheme.groups(self.in_features)

    @property
    def dot_dtype(self) -> str:
        """The dtype that weights are multiplied in: that of x, unless rounding scaled weights to it would show."""
        rounds = self.scheme.group_size is not None or self.scheme.offset == "minimums"
        return "float32" if rounds and self.out_dtype == "float32" else self.x_dtype

    @property
    def row_by_row(self) -> bool:
        """Whether rows are normalized one by one, so that a row's result does not depend on the others."""
        return self.batch_invariant

    def bytes_moved(self) -> int:
        """Returns the bytes that must move between memory and chip: all inputs and the result, once each."""
        return self.scheme.nbytes(self.in_features, self.out_features, self.scale_dtype) + self.bytes_beside()

    def planned(self) -> Problem:
        """Returns the problem that block sizes are chosen for: one of `INVARIANT_ROWS` where batch-invariant."""
        return dataclasses.replace(self, rows=INVARIANT_ROWS, batch_invariant=False) if self.batch_invariant else self

    def tuning_key(self) -> TuningKey:
        """Returns the properties that block sizes depend on."""
        x = self.x_dtype if self.quantize_x is None else f"{self.x_dtype} as {self.quantize_x}"
        gated = " gated" if self.gated else ""
        return TuningKey(
            kind=f"{x} x {self.scheme} with {self.scale_dtype} scales to {self.out_dtype}{gated}, {self.order}",
            sizes={"rows": self.rows, "in": self.in_features, "out": self.out_features},
        )

    def __str__(self) -> str:
        options = [
            f"quantize_x={self.quantize_x}" if self.quantize_x else "",
            "batch_invariant" if self.batch_invariant else "",
        ]
        return self.described(f"w={self.scheme}, scales={self.scale_dtype}", options)


def _check_weight(w: Any, layer: jax.Array | None) -> tuple[int, int]:
    """Checks that the arrays of a QuantizedArray agree with its scheme; returns in and out."""
    check(isinstance(w, QuantizedArray), "w", type(w).__name__, "a QuantizedArray; palladion.quantize makes one")
    if layer is None:
        check(w.values.ndim == 2, "w", f"shape {w.shape}", "[in, out]; of a stack say which by layer=, or take w[i]")
    else:
        check(w.values.ndim == 3, "w", f"shape {w.shape}", "[num_layers, in, out] with layer=")
        check_layer(layer, w.values.shape[0])
    check_parts(w)
    return w.in_features, w.out_features
