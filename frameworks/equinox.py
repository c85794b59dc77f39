"""Quantized weights in Equinox models: `quantize_model` replaces the weights of `eqx.nn.Linear` layers.

    from palladion.frameworks.equinox import quantize_model

    model, report = quantize_model(model, "int4-g32")

Layers stay `eqx.nn.Linear`, those in `eqx.nn.MultiheadAttention` too. Their `weight` is a `TransposedWeight`, with
which `weight @ x` is `quantized_matmul`: it has the dtype of x, and the bias is added to it. A layer that `jax.vmap`
applies to many rows, as Equinox does, multiplies all of them at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from palladion.reference.quantization import Order
from palladion.reference.quantized_trees import QuantizationReport, Where, quantize_tree, selects
from palladion.reference.quantizers import Method
from palladion.reference.scheme import Scheme

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError("palladion.frameworks.equinox needs Equinox: pip install 'palladion[frameworks]'") from error

Model = TypeVar("Model")


def quantize_model(
    model: Model,
    scheme: str | Scheme,
    *,
    where: Where | None = None,
    method: Method = "absmax",
    scale_dtype: Any = jnp.float32,
    order: Order | None = None,
) -> tuple[Model, QuantizationReport]:
    """Returns a model with the weights of its linear layers quantized, and a report of all its arrays.

    A weight that the scheme does not fit is left as it is; the report says why. Weights of stacked layers, as
    `eqx.filter_vmap` makes them, become stacks of matrices. A second call may give other layers another scheme. Weights
    of other modules that compute `weight @ x` are quantized by `quantize_tree(..., where=, transposed=True)`.

    Args:
      model: any Equinox module, or another pytree with `eqx.nn.Linear` layers in it; abstract ones as
        `eqx.filter_eval_shape` makes them become abstract, too.
      scheme: a `Scheme` or its name, as for `quantize`.
      where: the weights to quantize: a regular expression that is searched in their paths ("mlp/.*"), or a function of
        path and array. None: the weights of all linear layers.
      method: how scales are chosen; see `quantize`.
      scale_dtype: dtype of scales and minimums.
      order: storage order; None means that of the platform's kernels.

    Raises:
      ValueError: `where` selects no weight of a linear layer, or an option is not valid for `quantize`.
    """

    layers = {
        jax.tree_util.keystr((*path, jax.tree_util.GetAttrKey("weight")), simple=True, separator="/"): layer
        for path, layer in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear)
        if _is_linear(layer)
    }
    chosen = {name for name, layer in layers.items() if where is None or selects(where, name, layer.weight)}
    if not chosen:
        raise ValueError(f"quantize_model: where: got {where!r}, which selects none of {list(layers) or 'no layers'}")
    options: dict[str, Any] = {"method": method, "scale_dtype": scale_dtype, "order": order}
    return quantize_tree(model, scheme, where=lambda name, _: name in chosen, transposed=True, **options)


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)
