"""Compiles for TPUs on a machine without one: libtpu compiles for every generation wherever it is installed.

The result is what runs on the chip, within the limits of its registers and VMEM. Nothing is executed.

libtpu can also list its schedule, bundle by bundle. Flags tell it to, which it reads once, when it is loaded:
`keep_listings` must be called before the first compilation in a process, which then takes about a tenth longer.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from palladion.kernels import devices
from palladion.kernels.devices import Chip, tpu_chips

ENVIRONMENT: Final = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time
}
"""Environment variables that libtpu reads when it is loaded."""

LISTINGS: Final = {
    "bundles": "packed-bundles-post-ra",
    "utilization": "pre-delay_hlo-static-per-bundle-utilization",
}
"""Passes of the compiler whose results are listed, by attribute of `Listing`."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """The compiler's listings of a kernel, which `schedule.py` parses.

    Attributes:
      name: name of the instruction in the compiled program, "decode_attention_q1_kv512.1".
      bundles: the instructions of every cycle.
      utilization: the slots of each unit that every cycle uses.
      vmem_report: the use of VMEM by all kernels of the program.
    """

    name: str
    bundles: str
    utilization: str
    vmem_report: str


_listings: Path | None = None


def installed() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def device(chip: str) -> Any:
    """Returns a device to compile for; nothing can run on it.

    Args:
      chip: a name in `tpu_chips()`.

    Raises:
      ValueError: there is no such chip.
    """
    topology = _chip(chip).topology
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices[0]


def _chip(name: str) -> Chip:
    chips = tpu_chips()
    if name not in chips:
        raise ValueError(f"chip: got {name!r}; accepted: {', '.join(chips)}")
    return chips[name]


def keep_listings(folder: Path | None = None) -> None:
    """Makes libtpu list its schedules in this process.

    Args:
      folder: an empty folder for the listings, which are removed after each compilation; by default a temporary one.

    Raises:
      RuntimeError: libtpu is loaded already, without these flags.
    """
    global _listings
    if _listings is not None:
        return
    if _loaded():
        raise RuntimeError(
            "libtpu is loaded already, and reads its flags once: call tpu_compiler.keep_listings() before anything is "
            "compiled for a TPU in this process"
        )
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="palladion_listings_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _listings = folder
    labels = "|".join(f"^{label}$" for label in LISTINGS.values())
    flags = [
        f"--xla_jf_dump_to={_listings}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={labels}",
    ]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*os.environ.get("LIBTPU_INIT_ARGS", "").split(), *flags])


@contextlib.contextmanager
def tracing_for(chip: str) -> Iterator[None]:
    """Traces functions as if they ran on this TPU, so that they take the TPU kernels.

    Args:
      chip: a name in `tpu_chips()`.

    Raises:
      ValueError: there is no such chip.
    """
    with devices.tracing_for(_chip(chip).device_kind):
        yield


def compile_for_tpu(function: Callable[..., Any], *avals: Any, chip: str = "v6e") -> jax.stages.Compiled:
    """Compiles a function for a TPU, traced as by `tracing_for`.

    Args:
      function: a function of arrays, jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      chip: a name in `tpu_chips()`.
    """
    with _compiled(function, avals, chip) as compiled:
        return compiled


def list_kernels(
    function: Callable[..., Any], *avals: Any, chip: str = "v6e"
) -> tuple[jax.stages.Compiled, list[Listing]]:
    """Compiles a function for a TPU, and returns the listings of its Pallas kernels, in the program's order.

    For arguments see `compile_for_tpu`.

    Raises:
      RuntimeError: `keep_listings` was not called in time, or listings are missing.
    """
    keep_listings()
    # A new function, because JAX would not compile the same one again, and nothing would be listed.
    with _compiled(lambda *arguments: function(*arguments), avals, chip) as compiled:
        files = {path.name: path for path in _written()}
        report = next((path.read_text() for name, path in files.items() if name.endswith("vmem_report.html")), "")
        return compiled, [_listing(name, files, report) for name in kernel_names(compiled)]


def described(aval: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of an array as jit takes them: 64-bit dtypes become 32-bit ones."""
    is_extended = jnp.issubdtype(aval.dtype, jax.dtypes.extended)  # PRNG keys have dtypes of their own
    dtype = aval.dtype if is_extended else jax.dtypes.canonicalize_dtype(aval.dtype)
    return jax.ShapeDtypeStruct(aval.shape, dtype, sharding=sharding)


def kernel_names(compiled: jax.stages.Compiled) -> list[str]:
    """Returns the names of the Pallas kernels in a compiled program, in order."""
    return re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text() or "")


def _listing(kernel: str, files: dict[str, Path], vmem_report: str) -> Listing:
    texts = {}
    for attribute, label in LISTINGS.items():
        # "1795470590150388797-<kernel>-01-packed-bundles-post-ra.txt"
        form = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{re.escape(label)}\.txt")
        found = [name for name in files if form.fullmatch(name)]
        if not found:
            raise RuntimeError(f"the compiler has not listed {label} of {kernel}; it has listed {sorted(files)}")
        texts[attribute] = files[max(found)].read_text()
    return Listing(kernel, texts["bundles"], texts["utilization"], vmem_report)


@contextlib.contextmanager
def _compiled(function: Callable[..., Any], avals: tuple[Any, ...], chip: str) -> Iterator[jax.stages.Compiled]:
    """Compiles a function; listings are removed at the end of the context."""
    on_target = functools.partial(described, sharding=jax.sharding.SingleDeviceSharding(device(chip)))
    with tracing_for(chip):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        lowered = jitted.lower(*jax.tree.map(on_target, avals))
    try:
        # Otherwise XLA may place small arrays in VMEM, where the kernel reads them without a transfer.
        yield lowered.compile(compiler_options={"xla_msa_enable": "false"})
    finally:
        for path in _written():
            path.unlink()


def _written() -> list[Path]:
    return [] if _listings is None else [path for path in _listings.iterdir() if path.is_file()]


def _loaded() -> bool:
    """Whether this process has loaded libtpu."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text()
