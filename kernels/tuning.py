"""Block sizes: those that the caller insists on, else tuned ones, else those of a heuristic; and which it was.

Tuned block sizes are data: `kernels/<operation>/tuned/<device kind>.json`, and the same under `$PALLADION_CACHE/tuned`
for what users have tuned themselves, which comes first. An entry was found for one problem. Others of its kind, of
similar sizes, take it too, where their kernel can; what lies too far off is left to the heuristic.

The benchmarks' command `tune` writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.kernels.devices import target_device_kind

SOURCES: Final = ("explicit", "tuned", "nearest", "heuristic")
"""Where block sizes come from: the caller; an entry for this very problem; one for a similar problem; a formula."""

CACHE: Final = "PALLADION_CACHE"
"""The environment variable that names the folder of what a user has tuned."""

FARTHEST: Final = 2.0
"""Factors of two by which the sizes of an entry may differ, all sizes together."""


@dataclasses.dataclass(frozen=True)
class TuningKey:
    """What block sizes depend on.

    Attributes:
      kind: what must be the same: dtypes, layouts, what a program holds at least.
      sizes: what may differ, by name.
    """

    kind: str
    sizes: Mapping[str, int]

    def distance(self, other: TuningKey) -> float:
        """Factors of two between the sizes, added up; infinity for another kind."""
        if self.kind != other.kind or self.sizes.keys() != other.sizes.keys():
            return math.inf
        pairs = ((size, other.sizes[name]) for name, size in self.sizes.items())
        return sum(abs(math.log2(max(mine, 1) / max(theirs, 1))) for mine, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Space:
    """The block sizes that may be tried for a problem; `config in space` says whether it may be one of them.

    Attributes:
      start: those of the heuristic; fields without an axis stay as they are here.
      axes: the values that a field may take, in order, beside its own at the start.
      fits: whether a kernel takes a combination.
    """

    start: Any
    axes: Mapping[str, Sequence[Any]]
    fits: Callable[[Any], bool] = lambda _: True

    def values(self, field: str) -> list[Any]:
        """What a field may be, in order."""
        return sorted({getattr(self.start, field), *self.axes.get(field, ())})

    def __contains__(self, config: Any) -> bool:
        if type(config) is not type(self.start):
            return False
        fields = [field.name for field in dataclasses.fields(config)]
        return all(getattr(config, name) in self.values(name) for name in fields) and self.fits(config)

    def neighbours(self, config: Any) -> Iterator[Any]:
        """Those that differ from one in one step along one axis; then in two steps, which pass over a bad one."""
        for steps in (1, 2):
            for name in self.axes:
                values = self.values(name)
                place = values.index(getattr(config, name))
                for other in (place + steps, place - steps):
                    if not 0 <= other < len(values):
                        continue
                    try:
                        changed = dataclasses.replace(config, **{name: values[other]})
                    except ValueError:
                        continue  # two values that do not go together
                    if self.fits(changed):
                        yield changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Tuned block sizes, and what speaks for them.

    Attributes:
      implementation: whose they are, "triton" for example.
      kind: of the problem that they were found for.
      sizes: of that problem.
      config: the fields of the kernel's `Config`.
      seconds: of a call with them.
      heuristic_seconds: of a call with those of the heuristic.
      origin: "measured", or "estimated" from the compiler's schedule.
      versions: of what they were found with.
    """

    implementation: str
    kind: str
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    seconds: float
    heuristic_seconds: float
    origin: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> TuningKey:
        """The problem that they were found for."""
        return TuningKey(self.kind, self.sizes)


def resolve(operation: str, row: Any, problem: Any, config: Any) -> tuple[Any, str]:
    """The block sizes of a call, and where they come from.

    Args:
      operation: its name.
      row: the `Implementation` that runs it.
      problem: what is asked for.
      config: block sizes that the caller insists on, or None.

    Returns:
      A config of the kernel and one of `SOURCES`; what was given and "" where there is nothing to choose.
    """
    if row.heuristic is None:
        return config, ""
    if config is not None:
        return config, "explicit"
    planned = problem.planned()
    found = tuned(operation, row, planned)
    return found if found is not None else (row.heuristic(planned), "heuristic")


def tuned(operation: str, row: Any, problem: Any) -> tuple[Any, str] | None:
    """The nearest tuned block sizes that this problem's kernel takes, and "tuned" or "nearest"; None without any."""
    if row.space is None or row.config_class is None:
        return None
    key = problem.tuning_key()
    entries = [entry for entry in entries_for(operation, target_device_kind()) if entry.implementation == row.name]
    near = [(entry.key.distance(key), entry) for entry in entries]
    near = sorted((pair for pair in near if pair[0] <= FARTHEST), key=lambda pair: pair[0])
    if not near:
        return None
    space = row.space(problem)
    for distance, entry in near:
        try:
            config = row.config_class(**entry.config)
        except (TypeError, ValueError):
            continue  # of another version of this kernel
        if config in space:
            return config, "tuned" if distance == 0 else "nearest"
    return None


def entries_for(operation: str, device_kind: str) -> list[Entry]:
    """What is tuned for a device: the user's own entries, then those that come with the package."""
    found: list[Entry] = []
    for path in (user_file(operation, device_kind), package_file(operation, device_kind)):
        if path is not None and path.is_file():
            found += _read(path, path.stat().st_mtime_ns)
    return found


def package_file(operation: str, device_kind: str) -> Path:
    """Where block sizes for a device come with the package."""
    folder = importlib.resources.files("palladion.kernels").joinpath(operation)
    return Path(str(folder)) / "tuned" / f"{file_stem(device_kind)}.json"


def user_file(operation: str, device_kind: str) -> Path | None:
    """Where a user's own block sizes for a device are; None where `$PALLADION_CACHE` is not set."""
    cache = os.environ.get(CACHE)
    return Path(cache).expanduser() / "tuned" / operation / f"{file_stem(device_kind)}.json" if cache else None


def file_stem(device_kind: str) -> str:
    """A device's name as a file has it: "tpu_v6_lite"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> tuple[Entry, ...]:
    del changed  # a file that was written anew is read anew
    return tuple(load(path))


def load(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
      ValueError: it is not such a file.
    """
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not tuned block sizes; tune again, or remove it ({error!r})") from error


def save(path: Path, device_kind: str, entries: Sequence[Entry]) -> None:
    """Adds entries to a file; those for the same problem and kernel are replaced. One entry is one line."""
    kept = {_identity(entry): entry for entry in (load(path) if path.is_file() else [])}
    kept |= {_identity(entry): entry for entry in entries}
    lines = [json.dumps(dataclasses.asdict(kept[identity])) for identity in sorted(kept)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n    ".join(lines)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n    {text}\n  ]\n}}\n')
    partial.replace(path)


def _identity(entry: Entry) -> tuple[Any, ...]:
    return entry.implementation, entry.kind, tuple(entry.sizes.items())
