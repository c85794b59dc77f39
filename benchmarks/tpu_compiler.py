"""The TPU compiler on a machine without a TPU: libtpu compiles for every generation wherever it is installed.

What compiles here is what runs on the chip: XLA, Mosaic and their limits of registers and VMEM. Nothing is executed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Final

import jax
from jax.experimental import topologies

from palladion.kernels.devices import tpu_chips

ENVIRONMENT: Final = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time
}
"""What libtpu reads when it is loaded."""


def installed() -> bool:
    """Whether there is a libtpu to compile with."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def device(chip: str) -> Any:
    """A description of a TPU that need not be there.

    Args:
      chip: a name in `tpu_chips()`.

    Raises:
      ValueError: there is no such chip.
    """
    chips = tpu_chips()
    if chip not in chips:
        raise ValueError(f"chip: got {chip!r}; accepted: {', '.join(chips)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(chips[chip].topology, "tpu").devices[0]


def compile_for_tpu(function: Callable[..., Any], *avals: Any, chip: str = "v6e") -> jax.stages.Compiled:
    """Compiles a function for a TPU.

    While it is traced, whoever asks for the device is told of this one: `backend="pallas"` takes the TPU kernels.

    Args:
      function: of arrays; jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      chip: a name in `tpu_chips()`.
    """
    target = device(chip)
    sharding = jax.sharding.SingleDeviceSharding(target)

    def described(aval: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

    kind = jax.sharding.AbstractDevice(device_kind=target.device_kind, num_cores=target.num_cores, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        lowered = jitted.lower(*jax.tree.map(described, avals))
    # Otherwise XLA parks small arrays in VMEM, and the kernel reads them for nothing.
    return lowered.compile(compiler_options={"xla_msa_enable": "false"})
