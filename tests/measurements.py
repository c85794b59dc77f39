"""Made-up measurements for tests, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palladion.benchmarks.measure import records
from palladion.benchmarks.measure.records import Limits, Measurement

LIMITS = Limits(bandwidth=1e11, matrix_rate=1e13, matrix_dtype="bfloat16")


def measurement(contender: str, seconds: tuple[float, ...], **changes: Any) -> Measurement:
    given: dict[str, Any] = {"kind": "reference" if contender == "xla" else "peer", "status": "ok", "workload": "w"}
    return Measurement(
        operation="decode_attention",
        shape="batch=1",
        contender=contender,
        seconds=seconds,
        calls=1,
        **{"bytes": 10**9, "flops": 10**9, "bandwidth": 1e11, "units": 0.5} | given | changes,
    )


def write(path: Path, rows: list[Measurement], **provenance: Any) -> Path:
    given = {"device": "d", "versions": {}, "command": "c", "time": "t", "commit": "x", "load": 1, "cores": 2}
    with records.Writer(path, given | provenance, LIMITS) as writer:
        for one in rows:
            writer.write(one)
    return path
