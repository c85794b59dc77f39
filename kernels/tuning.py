"""Measurements decide the block sizes of a call, and which of two implementations is faster.

Entries are data, one for each implementation and problem: block sizes, and the time of a call with them. Users' own
are in `$PALLADION_CACHE/tuned/<operation>/<device kind>.json` and come first, the package's are in
`kernels/<operation>/tuned/<device kind>.json`. An entry also serves problems of the same kind and of similar sizes if
their kernel accepts its block sizes; other problems use the heuristic.

`compare` holds two implementations against each other: by their entries for the same problem, if the same clock has
measured both. The benchmarks' command `tune` writes these files.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.kernels.devices import target_device_kind
from palladion.kernels.implementation import Implementation, Problem
from palladion.kernels.search_space import TuningKey

SOURCES: Final = ("explicit", "tuned", "nearest", "heuristic")
"""Origins of a choice: the caller, measurements of the same problem, those of a similar one, the heuristic.

The heuristic for implementations is the order of their table."""

CACHE: Final = "PALLADION_CACHE"
"""Environment variable that names the folder of the user's own tuned block sizes."""

MAX_DISTANCE: Final = 2.0
"""Largest distance between a problem and an entry that it uses; see `TuningKey.distance`."""

LEAST_GAIN: Final = 1.03
"""Speedup from which on a measurement decides; measurements of the same kernel differ by up to 2 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The fastest block sizes of an implementation for one problem, and the time of a call with them.

    Attributes:
      implementation: name of the implementation, for example "triton".
      kind: `TuningKey.kind` of the problem.
      sizes: `TuningKey.sizes` of the problem.
      config: fields of the kernel's `Config`; None for an implementation without block sizes, such as XLA's form.
      seconds: time of a call.
      origin: "measured"; "prototype", where a kernel of the same form was measured; "estimated" from the compiler's
        schedule; or "interpreted", which says nothing. Only measured times are compared with each other.
      clock: what has measured the time: "device", the device's own for the kernels of a call, or "wall", the host's;
        empty where it is estimated.
      device: the device, for example "NVIDIA H200".
      date: day of the measurement, for example "2026-11-27".
      versions: versions of what was used: jax, the driver, the source.
      heuristic: whether these were the heuristic's block sizes: calls leave the choice to the heuristic then.
    """

    implementation: str
    kind: str
    sizes: Mapping[str, int]
    config: Mapping[str, Any] | None
    seconds: float
    origin: str
    clock: str
    device: str
    date: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heuristic: bool = False

    @property
    def key(self) -> TuningKey:
        """Key of the problem that the entry was tuned for."""
        return TuningKey(self.kind, self.sizes)

    def comparable(self, other: Entry) -> bool:
        """Returns whether the two times can be held against each other: measured for one problem, by one clock."""
        how = (self.origin, self.clock) == (other.origin, other.clock)
        return how and self.origin == "measured" and self.key.distance(other.key) == 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two implementations, measured for the same problem or for one like it.

    Attributes:
      faster: entry of the faster one.
      slower: entry of the slower one.
      source: "tuned" where they were measured for this problem, "nearest" for a similar one.
    """

    faster: Entry
    slower: Entry
    source: str

    @property
    def reason(self) -> str:
        """Why the slower one is passed over: "measured 20.1 us where xla takes 14.9 us (NVIDIA H200)"."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.slower.sizes.items())
        problem = f", {sizes}" if self.source == "nearest" else ""
        return (
            f"measured {1e6 * self.slower.seconds:,.1f} us where {self.faster.implementation} takes "
            f"{1e6 * self.faster.seconds:,.1f} us ({self.slower.device}{problem})"
        )


def resolve(operation: str, row: Implementation, problem: Problem, config: Any) -> tuple[Any, str]:
    """Returns the block sizes of a call, and their origin.

    Args:
      operation: name of the operation.
      row: the `Implementation` that runs the call.
      problem: shapes and options of the call.
      config: block sizes that the caller requires, or None.

    Returns:
      A config of the kernel and one of `SOURCES`; the caller's config and "" if the implementation has no block sizes.
    """
    if row.heuristic is None:
        return config, ""
    if config is not None:
        return config, "explicit"
    planned = problem.planned()
    block_sizes = tuned(operation, row, planned)
    return block_sizes if block_sizes is not None else (row.heuristic(planned), "heuristic")


def tuned(operation: str, row: Implementation, problem: Problem) -> tuple[Any, str] | None:
    """Returns the nearest tuned block sizes that the kernel accepts, with "tuned" or "nearest".

    None leaves the choice to the heuristic: nothing near was tuned, or the heuristic's block sizes were the best there.
    """
    for distance, entry, config in _serving(operation, row, problem):
        return None if entry.heuristic or config is None else (config, _source(distance))
    return None


def compare(operation: str, row: Implementation, other: Implementation, problem: Problem) -> Comparison | None:
    """Compares two implementations by the nearest problem for which both were measured by the same clock.

    Args:
      operation: name of the operation.
      row: an implementation that supports the problem.
      other: another one.
      problem: shapes and options of the call.

    Returns:
      None without such entries, or if the times differ too little to say which is faster.
    """
    planned = problem.planned()
    others = [entry for _, entry, _ in _serving(operation, other, planned)]
    for distance, entry, _ in _serving(operation, row, planned):
        rival = next((one for one in others if one.comparable(entry)), None)
        if rival is not None:
            faster, slower = sorted((entry, rival), key=lambda one: one.seconds)
            certain = slower.seconds >= LEAST_GAIN * faster.seconds
            return Comparison(faster, slower, _source(distance)) if certain else None
    return None


def _source(distance: float) -> str:
    return "tuned" if distance == 0 else "nearest"


def _serving(operation: str, row: Implementation, problem: Problem) -> Iterator[tuple[float, Entry, Any]]:
    """Yields the entries of an implementation that serve a problem, nearest first: distance, entry and block sizes."""
    key = problem.tuning_key()
    entries = [entry for entry in entries_for(operation, target_device_kind()) if entry.implementation == row.name]
    near = [(entry.key.distance(key), entry) for entry in entries]
    near = sorted((pair for pair in near if pair[0] <= MAX_DISTANCE), key=lambda pair: pair[0])
    space = row.space(problem) if near and row.space is not None else None
    for distance, entry in near:
        if space is None and entry.config is None:
            yield distance, entry, None
        elif space is not None and entry.config is not None and row.config_class is not None:
            try:
                config = row.config_class(**entry.config)
            except (TypeError, ValueError):
                continue  # tuned for another version of the kernel
            if config in space:
                yield distance, entry, config


def entries_for(operation: str, device_kind: str) -> list[Entry]:
    """Returns the entries for a device: the user's own, then those of the package."""
    entries: list[Entry] = []
    for path in (user_file(operation, device_kind), package_file(operation, device_kind)):
        if path is not None and path.is_file():
            entries += _read(path, path.stat().st_mtime_ns)
    return entries


def package_file(operation: str, device_kind: str) -> Path:
    """Returns the path of the package's entries for a device."""
    folder = importlib.resources.files("palladion.kernels").joinpath(operation)
    return Path(str(folder)) / "tuned" / f"{file_stem(device_kind)}.json"


def user_file(operation: str, device_kind: str) -> Path | None:
    """Returns the path of the user's own entries for a device; None if `$PALLADION_CACHE` is not set."""
    cache = os.environ.get(CACHE)
    return Path(cache).expanduser() / "tuned" / operation / f"{file_stem(device_kind)}.json" if cache else None


def file_stem(device_kind: str) -> str:
    """Returns a device kind as a file name: "tpu_v6_lite"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


@functools.lru_cache(maxsize=64)
def _read(path: Path, modified: int) -> tuple[Entry, ...]:
    del modified  # part of the cache key: a changed file is read again
    return tuple(load(path))


def load(path: Path) -> list[Entry]:
    """Returns the entries of a file.

    Raises:
      ValueError: the file does not contain tuned block sizes.
    """
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not tuned block sizes; tune again, or remove it ({error!r})") from error


def save(path: Path, entries: Sequence[Entry]) -> None:
    """Adds entries to a file, one per line, and replaces those for the same problem and implementation."""
    kept = {_identity(entry): entry for entry in (load(path) if path.is_file() else [])}
    kept |= {_identity(entry): entry for entry in entries}
    lines = ",\n".join(json.dumps(dataclasses.asdict(kept[identity])) for identity in sorted(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    partial.replace(path)


def _identity(entry: Entry) -> tuple[object, ...]:
    return entry.kind, tuple(entry.sizes.items()), entry.implementation
