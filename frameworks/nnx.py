"""Quantized weights in Flax NNX models: `quantize_model` replaces the kernels of linear layers, in place.

    from palladion.frameworks.nnx import quantize_model

    report = quantize_model(model, "int4-g32")

Layers stay the layers that they were: `nnx.Linear`, `nnx.LinearGeneral` (the projections of `nnx.MultiHeadAttention`)
and `nnx.Einsum`. Their `kernel` holds a `QuantizedArray`, their `dot_general` or `einsum_op` is `quantized_matmul`, and
their `promote_dtype` counts the kernel as what it was, so that results have the dtypes that they had. Paths in the
state, biases, `nnx.split`, `nnx.jit`, `nnx.scan` over stacked layers and checkpoints are as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from palladion.kernels.quantized_matmul import quantized_matmul
from palladion.reference.quantization import Order, QuantizedArray
from palladion.reference.quantized_trees import QuantizationReport, QuantizedLeaf, Where, quantize_tree, selects
from palladion.reference.quantizers import Method
from palladion.reference.scheme import Scheme

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("palladion.frameworks.nnx needs Flax: pip install 'palladion[frameworks]'") from error

LAYERS: Final = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
"""Layers whose kernels are quantized."""

CALLS: Final = [layer.__call__ for layer in (*LAYERS, nnx.LoRALinear)]
"""Functions that multiply by a kernel as those layers do; a subclass with another may do so in its own way."""


def quantize_model(
    model: nnx.Module,
    scheme: str | Scheme,
    *,
    where: Where | None = None,
    method: Method = "absmax",
    scale_dtype: Any = jnp.float32,
    order: Order | None = None,
) -> QuantizationReport:
    """Quantizes the kernels of a model's linear layers in place, one after the other.

    A kernel that the scheme does not fit, and a layer that does not multiply by one matrix, are left as they are; the
    report says why. Embeddings, norms and biases are no kernels of linear layers. Kernels of stacked layers, as
    `nnx.vmap` makes them, become stacks of matrices. A second call may give other layers another scheme.

    Args:
      model: any NNX module; inside `nnx.eval_shape` it becomes an abstract model, into which a checkpoint is restored.
      scheme: a `Scheme` or its name, as for `quantize`.
      where: the kernels to quantize: a regular expression that is searched in their paths ("mlp/.*"), or a function of
        path and array. None: the kernels of all linear layers.
      method: how scales are chosen; see `quantize`.
      scale_dtype: dtype of scales and minimums.
      order: storage order; None means that of the platform's kernels.

    Returns:
      What became of each `nnx.Param`, and its bytes before and after.

    Raises:
      ValueError: `where` selects no kernel of a linear layer, or an option is not valid for `quantize`.
    """
    nodes = list(nnx.iter_graph(model))
    layers = {id(layer.kernel): layer for _, layer in nodes if isinstance(layer, LAYERS)}
    leaves: list[QuantizedLeaf] = []
    for path, param in nodes:
        if not isinstance(param, nnx.Param):
            continue
        name, value = "/".join(map(str, path)), param.get_value()
        layer = layers.get(id(param))
        matrix = "no kernel of a linear layer" if layer is None else _matrix_of(layer, value)
        if layer is not None and not (where is None or selects(where, name, value)):
            matrix = "not selected by where"
        if isinstance(matrix, str):
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
            leaves.append(QuantizedLeaf(name, value.shape, value.dtype.name, None, matrix, size, size))
            continue
        kernel = value.transpose([*range(matrix.stack_axes), *matrix.in_axes, *matrix.out_axes])
        options: dict[str, Any] = {"method": method, "scale_dtype": scale_dtype, "order": order}
        options |= {"in_axes": len(matrix.in_axes), "stack_axes": matrix.stack_axes}
        quantized, report = quantize_tree({name: kernel}, scheme, where="", **options)
        leaves.append(dataclasses.replace(report.leaves[0], shape=value.shape))
        if isinstance(quantized[name], QuantizedArray):
            _replace(layer, quantized[name], tuple(value.shape[axis] for axis in matrix.out_axes))
    if leaves and all(leaf.reason in ("no kernel of a linear layer", "not selected by where") for leaf in leaves):
        raise ValueError(f"quantize_model: where: got {where!r}, which selects no kernel of a linear layer")
    return QuantizationReport(tuple(leaves))


@dataclasses.dataclass(frozen=True)
class PromoteDtype:
    """Promotes the dtypes of inputs and bias as if the kernel had the dtype from before it was quantized.

    Attributes:
      original: the layer's own `promote_dtype`.
      kernel_dtype: dtype of the kernel from before.
    """

    original: Callable[..., Any]
    kernel_dtype: str

    def __call__(self, arrays: tuple[Any, Any, Any], *, dtype: Any = None) -> tuple[Any, Any, Any]:
        """Returns inputs, the kernel as it is, and the bias or None."""
        inputs, kernel, bias = arrays
        inputs, _, bias = self.original((inputs, jnp.zeros((), self.kernel_dtype), bias), dtype=dtype)
        return inputs, kernel, bias


@dataclasses.dataclass(frozen=True)
class QuantizedDotGeneral:
    """Multiplies by a quantized kernel where a layer calls `jax.lax.dot_general`.

    Attributes:
      out_features: sizes of the kernel's axes that the result has.
    """

    out_features: tuple[int, ...]

    def __call__(
        self,
        inputs: jax.Array,
        kernel: QuantizedArray,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Contracts axes of the inputs with the kernel's `in`; `precision` has no meaning for it."""
        del precision
        (contracted, _), _ = dimension_numbers
        y = _product(inputs, contracted, kernel, self.out_features, preferred_element_type)
        return y if out_sharding is None else jax.reshard(y, out_sharding)


@dataclasses.dataclass(frozen=True)
class QuantizedEinsum:
    """Multiplies by a quantized kernel where a layer calls `jnp.einsum`.

    Attributes:
      out_features: sizes of the kernel's axes that the result has.
    """

    out_features: tuple[int, ...]

    def __call__(
        self,
        equation: str,
        inputs: jax.Array,
        kernel: QuantizedArray,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Computes einsum for an equation in which `_axes_of_equation` found the kernel to be a matrix."""
        del precision
        terms = _terms(equation)
        more = inputs.ndim - len(terms[0].replace("...", ""))  # dimensions of the ellipsis
        x, w, result = (_axes(term, more) for term in terms)
        contracted = [axis for axis in w if axis in x]
        y = _product(inputs, [x.index(axis) for axis in contracted], kernel, self.out_features, preferred_element_type)
        axes = [axis for axis in [*x, *w] if axis not in contracted]
        y = y.transpose([axes.index(axis) for axis in result])
        return y if out_sharding is None else jax.reshard(y, out_sharding)


def _product(
    x: jax.Array, contracted: Sequence[int], w: QuantizedArray, out_features: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns x @ w with the contracted axes of x as `in`, and `out` as the last axes of the result."""
    x = jnp.moveaxis(x, contracted, range(-len(contracted), 0))
    y = quantized_matmul(x.reshape(*x.shape[: -len(contracted)], w.in_features), w, out_dtype=dtype)
    return y.reshape(*y.shape[:-1], *out_features)


def _terms(equation: str) -> list[str]:
    """Returns the terms of an einsum of two operands: inputs, kernel, result."""
    operands, result = equation.replace(" ", "").split("->")
    return [*operands.split(","), result]


def _axes(term: str, more: int) -> list[str | int]:
    """Returns the names of a term's axes; those of an ellipsis are numbers."""
    before, ellipsis, after = term.partition("...")
    return [*before, *range(more if ellipsis else 0), *after]


class _Matrix(NamedTuple):
    """The axes of a kernel.

    Attributes:
      stack_axes: number of axes in front that are a stack of layers.
      in_axes: axes that are contracted with the inputs.
      out_axes: axes that the result has.
    """

    stack_axes: int
    in_axes: list[int]
    out_axes: list[int]


def _matrix_of(layer: Any, kernel: Any) -> _Matrix | str:
    """Returns how a layer's kernel is a matrix, or why it is left as it is."""
    if isinstance(kernel, QuantizedArray):
        return "quantized before"
    if type(layer).__call__ not in CALLS:
        return f"{type(layer).__name__} has a __call__ of its own"
    is_einsum = isinstance(layer, nnx.Einsum)
    functions = [layer.einsum_op] if is_einsum else [layer.dot_general, getattr(layer, "dot_general_cls", None)]
    if any(function not in (None, jnp.einsum, jax.lax.dot_general) for function in functions):
        return "multiplies by a function of its own"
    if is_einsum:
        axes = "no einsum_str of its own" if layer.einsum_str is None else _axes_of_equation(layer.einsum_str)
    elif isinstance(layer, nnx.Linear):
        axes = [0], [1]
    else:
        first, last = len(layer.in_features), len(layer.in_features) + len(layer.out_features)
        axes = "batch_axis: a matrix for each index" if layer.batch_axis else ([*range(first)], [*range(first, last)])
    if isinstance(axes, str):
        return axes
    stack_axes = kernel.ndim - sum(map(len, axes))
    return _Matrix(stack_axes, *([stack_axes + axis for axis in part] for part in axes))


def _replace(layer: Any, w: QuantizedArray, out_features: tuple[int, ...]) -> None:
    """Makes a layer multiply by quantized weights."""
    kernel_dtype = jnp.dtype(layer.kernel.dtype).name
    layer.kernel.set_value(w)
    layer.promote_dtype = PromoteDtype(layer.promote_dtype, kernel_dtype)
    if isinstance(layer, nnx.Einsum):
        layer.einsum_op = QuantizedEinsum(out_features)
    else:
        layer.dot_general = QuantizedDotGeneral(out_features)


def _axes_of_equation(equation: str) -> tuple[list[int], list[int]] | str:
    """Returns the kernel's axes that are `in` and `out`, or why it is no matrix."""
    x, w, result = (_axes(term, 1) for term in _terms(equation))
    if any(len(set(term)) < len(term) for term in (x, w, result)):
        return f"{equation}: an axis is named twice"
    if 0 in w or set(result) != set(x) ^ set(w):
        return f"{equation}: an axis is mapped over both operands, or summed in one"
    return [w.index(axis) for axis in w if axis in x], [w.index(axis) for axis in w if axis not in x]
