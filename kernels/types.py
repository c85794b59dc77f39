"""Names for the types that kernels and their callers use most."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from jax.experimental.pallas import tpu as pltpu

Ref: TypeAlias = Any
"""Reference to memory, or to semaphores, in a kernel: Pallas has no public type for it."""

Scalar: TypeAlias = jax.Array | int
"""Integer that is known while tracing, or a traced int32 scalar of a kernel."""

Interpret: TypeAlias = bool | pltpu.InterpretParams | None
"""Whether a kernel is interpreted, and how; None lets the backend decide."""
