"""Results as data: a file of JSON lines, of which the first says where it comes from, and the tables made of it.

    {"provenance": {device, driver, versions, commit, …}, "limits": {bandwidth, matrix rate, datasheet}}
    {"operation": …, "workload": …, "contender": …, "seconds": [every sample], …}

Rows are written as they are ready: what an interrupted run has measured is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal

from palladion.benchmarks.measure.timing import Samples, ratio

Status = Literal["ok", "wrong", "failed", "skipped", "untimed"]
"""Measured; not timed because its result is wrong; raised an error; does not cover the case or is not installed; right,
but not timed: its kernel is interpreted."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a machine can do at best.

    Attributes:
      bandwidth: bytes per second at which it reads memory, measured.
      matrix_rate: floating-point operations per second of large products in the dtype of `matrix_dtype`, measured.
      matrix_dtype: of their operands.
      datasheet: the device's name in its datasheet, or None.
      datasheet_bandwidth: the datasheet's bytes per second, or None.
      datasheet_flops: the datasheet's bfloat16 operations per second, or None.
    """

    bandwidth: float
    matrix_rate: float
    matrix_dtype: str
    datasheet: str | None = None
    datasheet_bandwidth: float | None = None
    datasheet_flops: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a contender on a workload.

    Attributes:
      operation: what is done, "decode_attention" for example.
      workload: its name.
      shape: the problem in words.
      contender: a backend or a peer.
      kind: "kernel", "reference" or "peer".
      status: see `Status`.
      reason: why it was not measured; empty where it was.
      seconds: of a call, every sample.
      calls: in a sample.
      bytes: that a call must move.
      flops: of a call.
      bandwidth: bytes per second at which memory was read in between, by `timing.memory_probe`; None where it was not.
      units: error in parts of what is accepted, or None.
      error: largest error relative to the scale of the oracle's values, or None.
      config: block sizes of a kernel, as text.
      config_source: where they come from: "explicit", "tuned", "nearest", "heuristic", or empty.
    """

    operation: str
    workload: str
    shape: str
    contender: str
    kind: str
    status: Status
    reason: str = ""
    seconds: tuple[float, ...] = ()
    calls: int = 0
    bytes: int = 0
    flops: int = 0
    bandwidth: float | None = None
    units: float | None = None
    error: float | None = None
    config: str = ""
    config_source: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes rows of two files comparable."""
        return self.operation, self.workload, self.contender

    @property
    def samples(self) -> Samples | None:
        """Its times, where it was timed."""
        return Samples(self.seconds, self.calls) if self.seconds else None

    @property
    def achieved(self) -> float | None:
        """Bytes per second, of those that must move."""
        return None if self.samples is None else self.bytes / self.samples.median

    @property
    def share_of_bandwidth(self) -> float | None:
        """Of the memory's bandwidth in the same minutes."""
        return None if self.achieved is None or not self.bandwidth else self.achieved / self.bandwidth


class Writer:
    """Writes a file of results row by row; usable in a `with` statement.

    Args:
      path: of the file; None writes nothing.
      provenance: of everything in it.
      limits: of the machine.
    """

    def __init__(self, path: Path | None, provenance: dict[str, Any], limits: Limits) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
            self._line({"provenance": provenance, "limits": dataclasses.asdict(limits)})

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        """Adds a row, on disk at once."""
        given = dataclasses.asdict(row)
        fields = {field.name: field.default for field in dataclasses.fields(Row)}
        self._line({name: _finite(value) for name, value in given.items() if value != fields[name]})

    def _line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def _finite(value: Any) -> Any:
    """JSON has no infinity; times need no more than seven digits."""
    if isinstance(value, tuple):
        return [float(f"{one:.7g}") for one in value]
    if isinstance(value, float):
        return "infinity" if math.isinf(value) else float(f"{value:.7g}")
    return value


def read(path: Path) -> tuple[dict[str, Any], Limits, list[Row]]:
    """Reads a file of results.

    Returns:
      Its provenance, the machine's limits, and the rows.

    Raises:
      ValueError: it is no such file.
    """
    try:
        first, *rest = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rows = [Row(**{name: _parsed(value) for name, value in entry.items()}) for entry in rest]
        return first["provenance"], Limits(**first["limits"]), rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of results, as `run --json` writes them ({error!r})") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Makes a file one JSON object, on one line: what `model` and `decode_peers` have measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")


def record(path: Path) -> dict[str, Any] | None:
    """The one JSON object that `write_record` has made of a file; None where it is something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError:  # rows, for example
        return None
    return found if isinstance(found, dict) else None


def _parsed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else math.inf if value == "infinity" else value


# --- Tables ---

HEADINGS: Final = (
    "contender",
    "time",
    "p20 to p80",
    "moves",
    "GB/s",
    "of measured",
    "of datasheet",
    "TFLOP/s",
    "error",
    "x xla",
    "x peer",
    "blocks",
)

LEGEND: Final = """\
time          median of a call, over samples taken in turns with the others
moves         bytes that must move between memory and chip, whatever a contender moves
of measured   bytes that must move over the time, in parts of the bandwidth that was measured in between
TFLOP/s       where arithmetic, not memory, sets the limit
error         largest error beside a float64 oracle, in parts of what is accepted: up to 1 is right
x xla, x peer how many times as fast as the reference, and as the fastest peer"""


def by_workload(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by what they are rows of, in the order in which it first appears."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.operation, row.workload), []).append(row)
    for (operation, workload), group in groups.items():
        yield f"{operation} {workload}", group


def cells(rows: Sequence[Row], limits: Limits) -> list[tuple[str, ...]]:
    """The table of a workload, as text; contenders without a time say why there is none."""
    reference = next((row.samples for row in rows if row.kind == "reference"), None)
    measured = [row.samples for row in rows if row.kind == "peer" and row.samples is not None]
    peer = min(measured, key=lambda samples: samples.median, default=None)
    return [_cells(row, limits, reference, peer) for row in rows]


def _cells(row: Row, limits: Limits, reference: Samples | None, peer: Samples | None) -> tuple[str, ...]:
    samples, error = row.samples, "" if row.units is None else "exact" if row.units == 0 else f"{row.units:.2g}"
    if samples is None:
        said = {"wrong": "WRONG: ", "untimed": "right; "}.get(row.status, "")
        return (row.contender, "-", said + row.reason, *[""] * 5, error, "", "", row.config)
    achieved = row.achieved or 0.0
    computes = row.bytes and row.flops / row.bytes > limits.matrix_rate / limits.bandwidth
    datasheet = limits.datasheet_bandwidth
    return (
        row.contender,
        duration(samples.median),
        f"{duration(samples.p20)} to {duration(samples.p80)}{' noisy' if samples.noisy else ''}",
        amount(row.bytes),
        f"{achieved / 1e9:,.3g}" if achieved < 1e12 else f"{achieved / 1e9:,.0f}",
        "" if row.share_of_bandwidth is None else f"{row.share_of_bandwidth:.0%}",
        "" if datasheet is None else f"{achieved / datasheet:.0%}",
        f"{row.flops / samples.median / 1e12:.3g}" if computes else "",
        error,
        "" if reference is None else f"{ratio(reference, samples):.2f}",
        "" if peer is None else f"{ratio(peer, samples):.2f}",
        f"{row.config} ({row.config_source})" if row.config else "",
    )


def duration(seconds: float) -> str:
    """A time with its unit, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def amount(count: float) -> str:
    """Bytes with their unit, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned table; the first column to the left, the others to the right; what is said instead of a time flows."""
    used = [n for n in range(len(headings)) if n == 0 or any(line[n] for line in lines)]
    # A reason is longer than any time: it does not widen its column.
    sized = [line for line in lines if line[1] != "-"] or [["-"] * len(headings)]
    widths = {n: max(len(headings[n]), *(len(line[n]) for line in (sized if n > 1 else lines))) for n in used}
    return "\n".join(_line([*line], used, widths) for line in (headings, *lines))


def _line(line: list[str], used: list[int], widths: dict[int, int]) -> str:
    if line[1] == "-":
        return f"{line[0]:<{widths[0]}s}  {'-':>{widths.get(1, 1)}s}  {line[2]}"
    return "  ".join(f"{line[n]:<{widths[n]}s}" if n == 0 else f"{line[n]:>{widths[n]}s}" for n in used).rstrip()
