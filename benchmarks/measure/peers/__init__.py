"""Peers: other packages' implementations of an operation, each behind one small interface.

A peer gets its operands in the layout and the dtypes that suit it best, prepared before anything is timed: transposing,
dequantizing and packing are not counted against it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Final

import jax
import numpy as np

from palladion.benchmarks.measure.timing import Runner
from palladion.kernels.checks import check
from palladion.kernels.decode_attention.cases import Case as AttentionCase


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another package's implementation of an operation.

    Attributes:
      name: its name in tables.
      operation: the operation's name.
      unavailable: returns why it cannot be used on this machine, or None.
      unsupported: returns why it does not cover a case, or None.
      make: compiles it for a case and its inputs; the runner's result has the operation's form.
      slow: whether it compiles, or searches, for many seconds.
    """

    name: str
    operation: str
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Any], str | None]
    make: Callable[[str, Any, Any], Runner]
    slow: bool = False


MODULES: Final = ("jax_peers", "torch_peers", "flash_peers")
"""Modules of this package that list peers as `PEERS`."""


def peers() -> dict[str, Peer]:
    """Returns all peers by name."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in MODULES]
    return {peer.name: peer for module in modules for peer in module.PEERS}


def select(names: list[str] | None, operation: str) -> list[Peer]:
    """Returns the named peers of an operation.

    Args:
      names: names of peers; None or ["all"] takes all of this operation, ["none"] none, ["fast"] those that compile
        quickly and ["slow"] the others.
      operation: peers of other operations are left out.

    Raises:
      ValueError: there is no peer of that name; the message lists them.
    """
    known = peers()
    sets = {
        "all": list(known),
        "none": [],
        "fast": [name for name, peer in known.items() if not peer.slow],
        "slow": [name for name, peer in known.items() if peer.slow],
    }
    (only, *others) = names or ["all"]
    chosen = sets[only] if only in sets and not others else list(names or [])
    for name in chosen:
        check(name in known, "--peers", name, f"{', '.join(sets)}, {', '.join(known)}")
    return [known[name] for name in chosen if known[name].operation == operation]


def first_reason(*reasons: str | None) -> str | None:
    """Returns the first reason that is not None, or None."""
    return next((reason for reason in reasons if reason), None)


def unsupported_attention(case: AttentionCase) -> str | None:
    """Returns why most attention functions do not cover a case: they have one dtype, no soft-cap and no sinks."""
    kv_dtype = case.kv_dtype or case.dtype
    return first_reason(
        f"a cache in {kv_dtype} with queries in {case.dtype}" if kv_dtype != case.dtype else None,
        "a soft-cap" if case.logits_soft_cap is not None else None,
        "sinks" if case.sinks else None,
        "a stack of layers" if case.num_layers is not None else None,
        "several new tokens" if case.q_len > 1 else None,
        "a window that is shorter than the cache" if (case.sliding_window or case.max_len) < case.max_len else None,
    )


def unsupported_dense(case: AttentionCase) -> str | None:
    """Returns why attention over a plain dense cache does not cover a case."""
    return first_reason("pages" if case.page_size is not None else None, unsupported_attention(case))


def unsupported_paged(case: AttentionCase) -> str | None:
    """Returns why attention over a plain paged cache does not cover a case."""
    return first_reason("a dense cache" if case.page_size is None else None, unsupported_attention(case))


def zero_dead_tokens(cache: jax.Array, lengths: jax.Array) -> np.ndarray:
    """Returns a dense cache with zeros beyond each length: peers may multiply masked values by a weight of zero."""
    alive = np.arange(cache.shape[2])[None, :] < np.asarray(lengths)[:, None]
    return np.where(alive[:, None, :, None], np.asarray(cache), 0).astype(cache.dtype)
