"""Peers: what others offer for an operation, each behind one small interface, at its best.

A peer gets its operands in the layout and the dtypes that it likes, prepared outside of what is timed. What it is not
asked to do for that (transposing, dequantizing, packing) is not held against it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from palladion.benchmarks.measure.timing import Runner
from palladion.kernels.checks import check


@dataclasses.dataclass(frozen=True)
class Contender:
    """What takes part in a comparison, compiled and warmed up.

    Attributes:
      runner: runs it.
      result: of its first call, as the operation returns it.
    """

    runner: Runner
    result: Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way of others to do what an operation does.

    Attributes:
      name: in tables.
      operation: which.
      missing: why it cannot be used on this machine, or None.
      refuses: what of a case it does not cover, or None.
      make: builds it for a case and its inputs.
    """

    name: str
    operation: str
    missing: Callable[[], str | None]
    refuses: Callable[[Any], str | None]
    make: Callable[[str, Any, Any], Contender]


MODULES: Final = ("jax_peers", "torch_peers", "flash_peers")
"""Where peers are listed, each module as its `PEERS`."""


def peers() -> dict[str, Peer]:
    """All peers by name."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in MODULES]
    return {peer.name: peer for module in modules for peer in module.PEERS}


def select(names: list[str] | None, operation: str) -> list[Peer]:
    """The peers of an operation that are asked for.

    Args:
      names: of peers; ["all"] takes all of this operation, ["none"] none; None takes all.
      operation: those of other operations are left out.

    Raises:
      ValueError: there is no peer of that name; the message lists them.
    """
    known = peers()
    chosen = list(known) if names in (None, ["all"]) else [] if names == ["none"] else list(names or [])
    for name in chosen:
        check(name in known, "--peers", name, f"all, none, {', '.join(known)}")
    return [known[name] for name in chosen if known[name].operation == operation]


def first(*reasons: str | None) -> str | None:
    """The first reason that there is."""
    return next((reason for reason in reasons if reason), None)


def plain_attention(case: Any) -> str | None:
    """What of a case most attention functions do not cover: they know one dtype, and neither soft-cap nor sinks."""
    kv_dtype = case.kv_dtype or case.dtype
    return first(
        f"a cache in {kv_dtype} with queries in {case.dtype}" if kv_dtype != case.dtype else None,
        "a soft-cap" if case.logits_soft_cap is not None else None,
        "sinks" if case.sinks else None,
        "a stack of layers" if case.num_layers is not None else None,
        "several new tokens" if case.q_len > 1 else None,
        "a window that is shorter than the cache" if (case.sliding_window or case.max_len) < case.max_len else None,
    )


def seen(part: Any, lengths: Any) -> Any:
    """A dense cache whose dead tokens are zero: peers may multiply what nobody sees by a weight of zero."""
    alive = np.arange(part.shape[2])[None, :] < np.asarray(lengths)[:, None]
    return np.where(alive[:, None, :, None], np.asarray(part), 0).astype(part.dtype)
