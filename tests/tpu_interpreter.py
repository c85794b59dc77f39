"""The TPU simulator in its two ways of moving memory, each of which finds what the other does not."""

from __future__ import annotations

from typing import Any, Final

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

MODES: Final[dict[str, Any]] = {
    # Transfers happen as soon as they are started: a buffer that is still in use is overwritten.
    "eager": pltpu.InterpretParams(dma_execution_mode="eager"),
    # Transfers happen as late as somebody waits for them, the last one first; accesses that nothing puts in order are
    # reported. Either way what was not written is NaN, and what is out of bounds raises.
    "races": pltpu.InterpretParams(detect_races=True),
}


def races_found() -> bool:
    """Whether the last kernel that ran with race detection had races: jax 0.10 only prints them."""
    races = interpret_pallas_call.races
    assert races is not None, "no kernel has run with race detection"
    return races.races_found
