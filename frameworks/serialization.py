"""Quantized weights in the checkpoints of other libraries.

Orbax, pickle and jax.export need nothing: quantized weights are pytrees. `flax.serialization` has a table of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from palladion.reference.quantization import QuantizedArray
from palladion.reference.scheme import Scheme
from palladion.reference.transposed import TransposedWeight


def register_flax_serialization() -> None:
    """Registers QuantizedArray and TransposedWeight with `flax.serialization`, once for a process.

    `to_bytes`, `from_bytes`, `to_state_dict`, `from_state_dict` and Flax's checkpoints then take them. A restored
    weight has the storage order of the target that it is restored into, and must have its scheme.

    Raises:
      ImportError: flax is not installed.
    """
    from flax.serialization import register_serialization_state

    register_serialization_state(QuantizedArray, _to_state, _from_state, override=True)
    register_serialization_state(
        TransposedWeight,
        lambda w: _to_state(w.matrix),
        lambda w, state: TransposedWeight(_from_state(w.matrix, state)),
        override=True,
    )


def _to_state(w: QuantizedArray) -> dict[str, Any]:
    """Returns the arrays of a weight, and its scheme and order as text."""
    parts = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)} | {"scheme": str(w.scheme)}
    return {name: part for name, part in parts.items() if part is not None}


def _from_state(target: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
    """Returns the weight that a state describes, in the storage order of the target."""
    scheme = Scheme.parse(state["scheme"])
    if scheme != target.scheme:
        raise ValueError(f"from_state_dict: got a weight in {scheme}; accepted: {target.scheme}, that of the target")
    parts = {name: part for name, part in state.items() if name != "scheme"}
    w = QuantizedArray(**({"zeros": None, "minimums": None} | parts), scheme=scheme).with_order(target.order)
    if w.shape != target.shape:
        raise ValueError(f"from_state_dict: got a weight {w.shape}; accepted: {target.shape}, that of the target")
    return w
