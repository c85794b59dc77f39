"""Measurements as data: files of JSON lines, and files of one JSON object.

The first line of a file of measurements says where they come from; each other line is a `Measurement`:

    {"provenance": {device, driver, versions, commit, …}, "limits": {bandwidth, matrix rate, datasheet}}
    {"operation": …, "workload": …, "contender": …, "seconds": [every sample], …}

Lines are written as soon as they are measured, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import IO, Any, Literal

from palladion.benchmarks.measure.samples import Samples

Status = Literal["ok", "wrong", "failed", "skipped", "untimed"]
"""The outcome for a contender.

"ok" was timed; "wrong" has a wrong result and was not timed; "failed" raised an error; "skipped" is not installed or
does not cover the case; "untimed" is right, but its kernel was interpreted.
"""

Provenance = dict[str, Any]
"""The origin of measurements, as `machine.provenance` returns it."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a machine.

    Attributes:
      bandwidth: measured memory bandwidth, in bytes per second.
      matrix_rate: measured floating-point operations per second of large matrix products in `matrix_dtype`.
      matrix_dtype: dtype of those matrices.
      datasheet: the device's name in its datasheet, or None.
      datasheet_bandwidth: the datasheet's memory bandwidth in bytes per second, or None.
      datasheet_flops: the datasheet's bfloat16 operations per second, or None.
    """

    bandwidth: float
    matrix_rate: float
    matrix_dtype: str
    datasheet: str | None = None
    datasheet_bandwidth: float | None = None
    datasheet_flops: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A contender on a workload, measured.

    Attributes:
      operation: the operation's name.
      workload: the workload's name.
      shape: the problem as text.
      contender: name of a backend or a peer.
      kind: "kernel", "reference" or "peer".
      status: what became of the contender.
      reason: why it was not timed; empty where it was.
      seconds: time of a call by wall clock, in every sample.
      calls: calls in a sample.
      device_seconds: device time of a call, in every repetition (`device_time.py`); empty where no profiler tells it.
      kernels: kernels of a call with their device time, as text.
      bytes: bytes that a call must move.
      flops: floating-point operations of a call.
      bandwidth: bytes per second of `timing.memory_probe` in the same rounds, by device time where it is known; None
        where nothing was timed.
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
    device_seconds: tuple[float, ...] = ()
    kernels: str = ""
    bytes: int = 0
    flops: int = 0
    bandwidth: float | None = None
    units: float | None = None
    error: float | None = None
    config: str = ""
    config_source: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Operation, workload and contender; measurements of two files with the same key can be compared."""
        return self.operation, self.workload, self.contender

    @property
    def samples(self) -> Samples | None:
        """Times of its calls by wall clock; None where it was not timed."""
        return Samples(self.seconds, self.calls) if self.seconds else None

    @property
    def device_samples(self) -> Samples | None:
        """Device times of its calls; None where they are not known."""
        return Samples(self.device_seconds, self.calls) if self.device_seconds else None

    @property
    def best_samples(self) -> Samples | None:
        """Device times where they are known, else wall clock: what rates rest on."""
        return self.device_samples or self.samples

    @property
    def achieved(self) -> float | None:
        """Bytes that must move, per second of the median call."""
        return None if self.best_samples is None else self.bytes / self.best_samples.median

    @property
    def share_of_bandwidth(self) -> float | None:
        """Achieved bytes per second over the memory bandwidth that was measured in the same rounds."""
        return None if self.achieved is None or not self.bandwidth else self.achieved / self.bandwidth


def by_the_same_clock(one: Measurement, other: Measurement) -> tuple[Samples, Samples] | None:
    """Returns the samples by which two measurements can be compared: device times if both have them; None if none."""
    if one.device_samples is not None and other.device_samples is not None:
        return one.device_samples, other.device_samples
    return None if one.samples is None or other.samples is None else (one.samples, other.samples)


class Writer:
    """Writes a file of measurements line by line; usable in a `with` statement.

    Args:
      path: the file; None writes nothing.
      provenance: where the measurements come from.
      limits: what the machine can do at best.
    """

    def __init__(self, path: Path | None, provenance: Provenance, limits: Limits) -> None:
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

    def write(self, measurement: Measurement) -> None:
        """Writes a measurement to disk at once; fields that have their default are left out."""
        given = dataclasses.asdict(measurement)
        defaults = {field.name: field.default for field in dataclasses.fields(Measurement)}
        self._line({name: _encoded(value) for name, value in given.items() if value != defaults[name]})

    def _line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def _encoded(value: Any) -> Any:
    """JSON has no infinity; times need no more than seven digits."""
    if isinstance(value, tuple):
        return [float(f"{one:.7g}") for one in value]
    if isinstance(value, float):
        return "infinity" if math.isinf(value) else float(f"{value:.7g}")
    return value


def _decoded(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else math.inf if value == "infinity" else value


def read(path: Path) -> tuple[Provenance, Limits, list[Measurement]]:
    """Reads a file of measurements.

    Returns:
      Where they come from, the machine's limits, and the measurements.

    Raises:
      ValueError: the file is something else.
    """
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # the last line is cut off where the process was ended while it wrote
        first, *rest = [json.loads(line) for line in whole.splitlines() if line.strip()]
        measurements = [Measurement(**{name: _decoded(value) for name, value in entry.items()}) for entry in rest]
        return first["provenance"], Limits(**first["limits"]), measurements
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of results, as `run --json` writes them ({error!r})") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes one JSON object as the whole file, on one line: the results of `model` and `decode_peers`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is ended meanwhile leaves the record that was there.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """Reads the JSON object that `write_record` has written; returns None where the file is something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError:  # several lines, for example
        return None
    return found if isinstance(found, dict) else None
