"""Weights in the format that `palladion quantize` writes: a safetensors tensor for each part of a `QuantizedArray`.

A weight `name` is stored as `save_tree` does it, as `name.values`, `name.scales` and, where the scheme has them,
`name.zeros` and `name.minimums`, in the order "out_in". config.json has {"quantization_config": {"quant_method":
"palladion", "scheme": "int4-g32"}}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.model.checkpoint_files import CheckpointError, JsonFile, shorten
from palladion.model.checkpoint_reader import StoredTensor
from palladion.reference.quantization import QuantizedArray, check_parts, dequantize
from palladion.reference.scheme import Scheme

SECTION: Final = "quantization_config"
"""Section of config.json that says how weights are quantized."""

METHOD: Final = "palladion"
"""The method of this format."""

PARTS: Final = ("values", "scales", "zeros", "minimums")
"""Parts of a quantized weight."""

VALUES: Final = ".values"
"""Ending of the name of the part that every weight has."""


def read_scheme(values: JsonFile) -> Scheme | None:
    """Returns the scheme of a checkpoint's weights, None where they do not have this format.

    Args:
      values: config.json.

    Raises:
      CheckpointError: the scheme is not known.
    """
    section = values.section(SECTION)
    if section.content.get("quant_method") != METHOD:
        return None
    try:
        return Scheme.parse(section.text("scheme") or "")
    except ValueError as error:
        raise CheckpointError(f"{values.path}: {SECTION}: {error}; take the original file") from error


def stored_parts(weight: QuantizedArray) -> list[str]:
    """Returns the names of the parts that a weight has."""
    return [part for part in PARTS if getattr(weight, part) is not None]


def stored_quantized(
    name: str, scheme: Scheme, shape: tuple[int, ...], read: Callable[[], Mapping[str, np.ndarray]]
) -> StoredTensor:
    """Returns a quantized weight that is not read yet.

    Args:
      name: the weight's name.
      scheme: how it is quantized.
      shape: shape of its values, `[out, in]` or `[out, in / 2]`.
      read: reads its parts.
    """

    def read_quantized() -> QuantizedArray:
        parts = {part: jnp.asarray(array) for part, array in read().items()}
        given: dict[str, Any] = {part: parts.get(part) for part in PARTS}
        weight = QuantizedArray(**given, scheme=scheme, order="out_in")
        try:
            check_parts(weight)
        except ValueError as error:
            raise CheckpointError(f"tensor {shorten(name)}: {error}; quantize the checkpoint again") from error
        return weight

    def read_dense(dtype: Any) -> np.ndarray:
        return np.asarray(dequantize(read_quantized(), dtype).T)

    logical = (*shape[:-1], shape[-1] * (2 if scheme.packed else 1))
    return StoredTensor(name, logical, read_dense, read_quantized)
