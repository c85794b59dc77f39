"""Two modes of the TPU interpreter, with early and with late transfers: each finds bugs that the other misses."""

from __future__ import annotations

from typing import Any, Final

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

MODES: Final[dict[str, Any]] = {
    # Transfers happen as soon as they are started, so they overwrite a buffer that is still in use.
    "eager": pltpu.InterpretParams(dma_execution_mode="eager"),
    # Transfers happen only when they are waited for, the last one first. Unordered accesses are reported as races.
    # In both modes memory that was never written is NaN, and accesses out of bounds raise.
    "races": pltpu.InterpretParams(detect_races=True),
}


def races_found() -> bool:
    """Returns whether the last kernel that ran with race detection had races; jax 0.10 only prints them."""
    races = interpret_pallas_call.races
    assert races is not None, "no kernel has run with race detection"
    return races.races_found
