"""The TPU compiler on a machine without a TPU: libtpu compiles for every generation wherever it is installed.

What compiles here is what runs on the chip: XLA, Mosaic and their limits of registers and VMEM. Nothing is executed.

libtpu can also list what it has scheduled, bundle by bundle. It is told so by flags that it reads once, when it is
loaded: `keep_listings` must come before the first compilation of a process, which then takes about a tenth longer.
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

from palladion.kernels.devices import tpu_chips

ENVIRONMENT: Final = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time
}
"""What libtpu reads when it is loaded."""

LISTINGS: Final = {
    "bundles": "packed-bundles-post-ra",
    "utilization": "pre-delay_hlo-static-per-bundle-utilization",
}
"""The passes of the compiler whose result is listed."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """What the compiler lists of a kernel; `static/schedule.py` reads it.

    Attributes:
      name: of the instruction in the compiled program, "decode_attention_q1_kv512.1".
      bundles: the instructions of every cycle.
      utilization: how much of each unit every cycle uses.
      vmem_report: what lies in VMEM, of all kernels of the program.
    """

    name: str
    bundles: str
    utilization: str
    vmem_report: str


_listings: Path | None = None


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


def keep_listings(folder: Path | None = None) -> None:
    """Has libtpu list what it schedules in this process.

    Args:
      folder: where, in an empty folder that nobody else uses; by default a temporary one, removed at exit. Nothing
        stays there after a compilation.

    Raises:
      RuntimeError: libtpu was loaded before, without being told so.
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
    """While a function is traced here, whoever asks for the device is told of this one: it takes the TPU kernels."""
    target = device(chip)
    kind = jax.sharding.AbstractDevice(device_kind=target.device_kind, num_cores=target.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        yield


def compile_for_tpu(function: Callable[..., Any], *avals: Any, chip: str = "v6e") -> jax.stages.Compiled:
    """Compiles a function for a TPU, traced as by `tracing_for`.

    Args:
      function: of arrays; jitted (with donated arguments, say) or not.
      avals: its arguments, arrays or `jax.ShapeDtypeStruct`s, in any pytree.
      chip: a name in `tpu_chips()`.
    """
    with _compiled(function, avals, chip) as compiled:
        return compiled


def list_kernels(
    function: Callable[..., Any], *avals: Any, chip: str = "v6e"
) -> tuple[jax.stages.Compiled, list[Listing]]:
    """Compiles a function for a TPU and returns what the compiler lists of its Pallas kernels, in the program's order.

    Arguments are those of `compile_for_tpu`.

    Raises:
      RuntimeError: `keep_listings` was not called in time, or the compiler has listed something else than it used to.
    """
    keep_listings()
    # What JAX has compiled before it would not compile again, and nothing would be listed.
    with _compiled(lambda *arguments: function(*arguments), avals, chip) as compiled:
        files = {path.name: path for path in _written()}
        report = next((path.read_text() for name, path in files.items() if name.endswith("vmem_report.html")), "")
        return compiled, [_listing(name, files, report) for name in kernel_names(compiled)]


def described(aval: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, the latter as jit takes it: NumPy's 64 bits become 32."""
    is_extended = jnp.issubdtype(aval.dtype, jax.dtypes.extended)  # PRNG keys, whose dtype is nobody else's
    dtype = aval.dtype if is_extended else jax.dtypes.canonicalize_dtype(aval.dtype)
    return jax.ShapeDtypeStruct(aval.shape, dtype, sharding=sharding)


def kernel_names(compiled: jax.stages.Compiled) -> list[str]:
    """Names of the Pallas kernels in a compiled program, in its order."""
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
    """Compiles; what libtpu has written meanwhile stays as long as the context."""
    on_target = functools.partial(described, sharding=jax.sharding.SingleDeviceSharding(device(chip)))
    with tracing_for(chip):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        lowered = jitted.lower(*jax.tree.map(on_target, avals))
    try:
        # Otherwise XLA parks small arrays in VMEM, and the kernel reads them for nothing.
        yield lowered.compile(compiler_options={"xla_msa_enable": "false"})
    finally:
        for path in _written():
            path.unlink()


def _written() -> list[Path]:
    return [] if _listings is None else [path for path in _listings.iterdir() if path.is_file()]


def _loaded() -> bool:
    """Whether this process has libtpu in its memory."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text()
