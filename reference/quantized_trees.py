"""`quantize_tree`: quantizes the matrices of a model, and reports what became of each of its arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.reference.leading import MatrixStack
from palladion.reference.quantization import Order, QuantizedArray
from palladion.reference.quantizers import Method, matrix_shape, quantize
from palladion.reference.scheme import Scheme, check_in_features
from palladion.reference.transposed import TransposedWeight

Where = str | Callable[[str, Any], bool]
"""Selects arrays by a regular expression that is searched in their paths, or by a function of path and array."""

InAxes = int | Mapping[str, int] | Callable[[str, Any], int | None]
"""Number of `in` axes: of all arrays, by regular expressions searched in paths, or by a function of path and array."""

SMALLEST: Final = 128
"""Least `in` and `out` of a matrix that is quantized where the caller does not say which are: smaller ones are not
worth it, and stacked biases and norms look like matrices."""

EMBEDDING: Final = re.compile(r"embed|(?:^|[/_.])(?:emb|wte|wpe)(?:$|[/_.])", re.IGNORECASE)
"""Finds paths of embeddings, whose rows are looked up and not multiplied by."""

SHOWN: Final = 8
"""Number of paths that an error message names."""


@dataclasses.dataclass(frozen=True)
class QuantizedLeaf:
    """The entry of one array in a `QuantizationReport`.

    Attributes:
      path: names on the way to it, joined by "/".
      shape: shape before.
      dtype: dtype before.
      scheme: scheme that it was quantized by, or None.
      reason: why it was left as it is; empty where it was quantized.
      bytes_before: its bytes before.
      bytes_after: its bytes after.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    scheme: Scheme | None
    reason: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Tells what `quantize_tree` did; `print` shows it as a table.

    Attributes:
      leaves: an entry for each array of the tree.
    """

    leaves: tuple[QuantizedLeaf, ...]

    @property
    def quantized(self) -> tuple[QuantizedLeaf, ...]:
        """The arrays that were quantized."""
        return tuple(leaf for leaf in self.leaves if not leaf.reason)

    @property
    def left(self) -> tuple[QuantizedLeaf, ...]:
        """The arrays that are as they were, with reasons."""
        return tuple(leaf for leaf in self.leaves if leaf.reason)

    @property
    def bytes_before(self) -> int:
        """Bytes of all arrays before."""
        return sum(leaf.bytes_before for leaf in self.leaves)

    @property
    def bytes_after(self) -> int:
        """Bytes of all arrays after."""
        return sum(leaf.bytes_after for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [("path", "shape", "dtype", "MB", "now MB", "")]
        for leaf in self.leaves:
            sizes = f"{leaf.bytes_before / 1e6:.3f}", f"{leaf.bytes_after / 1e6:.3f}"
            became = f"left: {leaf.reason}" if leaf.reason else str(leaf.scheme)
            rows.append((leaf.path, str(list(leaf.shape)), leaf.dtype, *sizes, became))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [
            "  ".join(
                cell.rjust(width) if 3 <= n <= 4 else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        before, after = self.bytes_before, self.bytes_after
        share = f", {after / before:.0%}" if before else ""
        summary = (
            f"{len(self.quantized)} of {len(self.leaves)} arrays quantized: {before / 1e6:.3f} MB before, "
            f"{after / 1e6:.3f} MB after{share}"
        )
        return "\n".join([*aligned, summary])


def quantize_tree(
    tree: Any,
    scheme: str | Scheme,
    *,
    where: Where | None = None,
    in_axes: InAxes | None = None,
    stack_axes: int = 0,
    transposed: bool = False,
    method: Method = "absmax",
    scale_dtype: Any = jnp.float32,
    order: Order | None = None,
) -> tuple[Any, QuantizationReport]:
    """Quantizes the matrices among the leaves of a pytree, and reports what became of each array.

    A selected array that the scheme does not fit, for example because `in` is not a multiple of the group, is left as
    it is, and the report has the reason. A tree that is quantized again keeps its QuantizedArrays, so that a second
    call may give other arrays another scheme. Abstract leaves (`jax.ShapeDtypeStruct`) become abstract
    QuantizedArrays, so that memory can be planned without weights. Arrays are quantized one after another: of NumPy's
    arrays one at a time is on the device.

    Args:
      tree: any pytree: nested dicts, an NNX state, an Equinox module. What is no array stays as it is.
      scheme: a `Scheme` or its name, as for `quantize`.
      where: the arrays to quantize: a regular expression that is searched in their paths ("mlp/.*kernel"), or a
        function of path and array. None: float arrays with an `in` and `out` of at least 128, whose path does not name
        an embedding ("embed", "emb", "wte", "wpe").
      in_axes: number of axes that are `in`, for kernels of more than two axes; see `quantize`. A number for all, a dict
        from regular expressions to numbers ({"attention/(query|key|value)": 1, "attention/out": 2}), of which the first
        that is found in the path counts, or a function of path and array. None: the last two axes are `in` and `out`,
        those before them a stack.
      stack_axes: number of axes before `in` that are a stack, where `in_axes` gives a number.
      transposed: whether matrices are `[..., out, in]`, as Equinox and PyTorch have them, unless `in_axes` says which
        axes are `in`. They become `TransposedWeight`s, for `weight @ x`.
      method: how scales are chosen; see `quantize`.
      scale_dtype: dtype of scales and minimums.
      order: storage order; None means that of the platform's kernels.

    Returns:
      The tree with `QuantizedArray`s (`TransposedWeight`s where transposed), and the report.

    Raises:
      ValueError: `where` selects no array, or an option is not valid for `quantize`.
    """
    scheme = Scheme.parse(scheme)
    make = functools.partial(quantize, scheme=scheme, method=method, scale_dtype=scale_dtype, order=order)
    entries: list[QuantizedLeaf] = []
    selected = 0

    def convert(keys: Any, leaf: Any) -> Any:
        nonlocal selected
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes = _axes_of(in_axes, path, leaf)
        layout = _Layout(axes, stack_axes, transposed and axes is None)
        is_selected = selects(where, path, leaf)
        selected += is_selected
        by_default = path if where is None else None
        reason = _reason_against(leaf, scheme, layout, by_default) if is_selected else "not selected by where"
        result = leaf if reason else _converted(leaf, make, layout)
        used = None if reason else scheme
        sizes = _nbytes(leaf), _nbytes(result)
        entries.append(QuantizedLeaf(path, tuple(leaf.shape), str(leaf.dtype), used, reason, *sizes))
        return result

    tree = jax.tree_util.tree_map_with_path(convert, tree, is_leaf=lambda node: isinstance(node, MatrixStack))
    if entries and not selected:
        paths = ", ".join(entry.path for entry in entries[:SHOWN]) + (", …" if len(entries) > SHOWN else "")
        raise ValueError(f"quantize_tree: where: got {where!r}, which selects none of {len(entries)} arrays: {paths}")
    return tree, QuantizationReport(tuple(entries))


class _Layout(NamedTuple):
    """Which axes of a weight are `in`, as for `quantize`, or whether its matrices are `[out, in]`."""

    in_axes: int | None
    stack_axes: int
    transposed: bool

    def matrices(self, weight: jax.Array) -> jax.Array:
        """Returns a weight as `[..., in, out]`."""
        if self.in_axes is not None:
            return weight.reshape(matrix_shape(weight.shape, self.in_axes, self.stack_axes))
        return weight.mT if self.transposed else weight


def selects(where: Where | None, path: str, leaf: Any) -> bool:
    """Returns whether the caller selects an array, or leaves the choice to the default."""
    if where is None:
        return True
    return re.search(where, path) is not None if isinstance(where, str) else bool(where(path, leaf))


def _axes_of(in_axes: InAxes | None, path: str, leaf: Any) -> int | None:
    """Returns the number of `in` axes that the caller gives for an array, or None."""
    if isinstance(in_axes, Mapping):
        return next((axes for pattern, axes in in_axes.items() if re.search(pattern, path)), None)
    return in_axes(path, leaf) if callable(in_axes) else in_axes


def _reason_against(leaf: Any, scheme: Scheme, layout: _Layout, path: str | None) -> str:
    """Returns why an array is left as it is, or an empty string.

    Args:
      leaf: the array.
      scheme: the scheme to quantize it by.
      layout: the axes of a matrix.
      path: path of the array where the default rule decides, None where the caller selects it.
    """
    if isinstance(leaf, MatrixStack):
        return "quantized before"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "no float dtype"
    if len(leaf.shape) < 2:
        return "fewer than two dimensions"
    if path is not None and EMBEDDING.search(path):
        return "named as an embedding"
    try:
        in_features, out_features = jax.eval_shape(layout.matrices, leaf).shape[-2:]
        if path is not None and min(in_features, out_features) < SMALLEST:
            return f"[{in_features}, {out_features}] has a dimension below {SMALLEST}"
        check_in_features(in_features, scheme)
    except ValueError as error:
        return str(error)
    return ""


def _converted(
    leaf: Any, make: Callable[[jax.Array], QuantizedArray], layout: _Layout
) -> QuantizedArray | TransposedWeight:
    """Returns an array quantized, abstract if it is."""

    def convert(weight: Any) -> QuantizedArray | TransposedWeight:
        quantized = make(layout.matrices(jnp.asarray(weight)))
        return quantized.mT if layout.transposed else quantized

    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(convert, leaf)
    return jax.block_until_ready(convert(leaf))  # before the next array needs memory


def _nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, abstract or not."""
    return leaf.nbytes if isinstance(leaf, MatrixStack) else math.prod(leaf.shape) * leaf.dtype.itemsize
