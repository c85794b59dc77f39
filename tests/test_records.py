"""Files of measurements are written, read again, tabulated and compared."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from measurements import LIMITS, measurement, write

from palladion.benchmarks.commands import compare, main
from palladion.benchmarks.measure import records, tables
from palladion.benchmarks.measure.records import Measurement
from palladion.benchmarks.text import duration, table

pytestmark = pytest.mark.usefixtures("small_probes")


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = [
        measurement("xla", (0.1, 0.2)),
        measurement("a", (), status="wrong", units=math.inf, error=math.inf, reason="off"),
    ]
    provenance, limits, found = records.read(write(tmp_path / "a.jsonl", rows))
    assert (found, limits, provenance["device"]) == (rows, LIMITS, "d")


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    writer = records.Writer(path, {}, LIMITS)
    writer.write(measurement("xla", (0.1,)))
    # A row is on disk before the next one is written, even if the writer is never closed.
    assert [one.contender for one in records.read(path)[2]] == ["xla"]
    writer.write(measurement("peer", (0.1,)))
    assert len(records.read(path)[2]) == 2
    writer.close()


@pytest.mark.parametrize("text", ["", "{}", '{"provenance": {}, "limits": {}}', "no"])
def test_what_is_no_file_of_results_is_said(tmp_path: Path, text: str):
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match="a: not a file of results"):
        records.read(tmp_path / "a")


def test_the_table_of_a_workload():
    rows = [
        measurement("xla", (0.02, 0.02, 0.02)),
        measurement("kernel", (0.0125,) * 3, kind="kernel", config="block=1", config_source="tuned"),
        measurement("fast", (0.01, 0.01, 0.04)),
        measurement("slow", (0.1,) * 3),
        measurement("bad", (), status="wrong", reason="error 1"),
    ]
    limits = dataclasses.replace(LIMITS, datasheet="h", datasheet_bandwidth=2e11)
    lines = [dict(zip(tables.HEADINGS, line, strict=True)) for line in tables.cells(rows, limits)]
    kernel = lines[1]
    assert (kernel["time"], kernel["GB/s"], kernel["of measured"], kernel["of datasheet"]) == (
        "12.5 ms",
        "80",
        "80%",
        "40%",
    )
    assert (kernel["x xla"], kernel["x peer"], kernel["TFLOP/s"]) == ("1.60", "0.80", "")
    assert kernel["blocks"] == "block=1 (tuned)"
    assert "noisy" in lines[2]["p20 to p80"]
    assert lines[4]["p20 to p80"] == "WRONG: error 1"
    text = table(tables.HEADINGS, tables.cells(rows, limits)).splitlines()
    assert len(text) == 6
    assert "TFLOP/s" not in text[0]  # nothing is bound by arithmetic
    busy = tables.cells([measurement("xla", (0.1,), flops=10**12)], limits)[0]
    assert busy[tables.HEADINGS.index("TFLOP/s")] == "10"


def test_device_time_decides_where_both_have_it(tmp_path: Path):
    rows = [
        measurement("xla", (0.02,) * 3, device_seconds=(0.016,) * 3),
        measurement(
            "kernel", (0.019,) * 3, kind="kernel", device_seconds=(0.0125, 0.0125, 0.0127), kernels="k 12.5 ms"
        ),
        measurement("peer", (0.01,) * 3),
    ]
    _, _, found = records.read(write(tmp_path / "a.jsonl", rows))
    assert found == rows
    lines = [dict(zip(tables.HEADINGS, line, strict=True)) for line in tables.cells(rows, LIMITS)]
    kernel = lines[1]
    assert (kernel["time"], kernel["device"], kernel["GB/s"], kernel["of measured"]) == (
        "19 ms",
        "12.5 ms ±0.5%",
        "80",
        "80%",
    )
    assert kernel["x xla"] == "1.28"
    assert kernel["x peer"] == "0.53"  # the peer has wall clock alone
    assert lines[2]["device"] == ""
    was = [dataclasses.replace(rows[1], device_seconds=(0.01,) * 3)]
    assert compare.compare(was, [rows[1]])[0].factor == pytest.approx(0.8)
    assert compare.compare([dataclasses.replace(rows[1], device_seconds=())], [rows[1]])[0].change == "same"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5, "1.5 s"), (0.0125, "12.5 ms"), (0.001, "1 ms"), (3.21e-5, "32.1 µs"), (5e-8, "50 ns"), (1234.0, "1234 s")],
)
def test_times_are_read_easily(seconds: float, text: str):
    assert duration(seconds) == text


# --- Comparison of two files ---


@pytest.mark.parametrize(
    ("new", "change", "status"),
    [
        (measurement("xla", (0.5, 0.5, 0.5)), "faster", 0),
        (measurement("xla", (2.0, 2.0, 2.0)), "slower", 1),
        (measurement("xla", (1.02, 1.03, 1.04)), "same", 0),
        (measurement("xla", (0.9, 0.95, 1.5, 1.6, 2.0)), "same", 0),  # slower by its median, within the noise
        (measurement("xla", (), status="wrong"), "wrong now", 1),
        (measurement("xla", (), status="skipped"), "gone", 1),
        (None, "not measured", 0),
        (measurement("other", (1.0,)), "gone", 1),
    ],
)
def test_what_changed_beyond_noise(tmp_path: Path, new: Measurement | None, change: str, status: int):
    old = [measurement("xla", (0.9, 1.0, 1.1))]
    files = [write(tmp_path / "old", old), write(tmp_path / "new", [new] if new else [])]
    difference, *_ = compare.compare(old, [new] if new else [])
    assert difference.change == change
    assert main(["compare", *map(str, files)]) == status


def test_comparisons_beside_the_memory_of_the_same_minutes():
    old, new = [measurement("xla", (1.0,) * 3)], [measurement("xla", (2.0,) * 3, bandwidth=0.5e11)]
    assert compare.compare(old, new)[0].change == "slower"
    beside = compare.compare(old, new, by_memory=True)[0]
    assert (beside.change, beside.factor) == ("same", pytest.approx(1.0))
    assert compare.compare([], new)[0].change == "new"
    slower = compare.compare([measurement("torch", (1.0,) * 3)], [measurement("torch", (9.0,) * 3)])[0]
    assert (slower.change, slower.worse) == ("slower", False)  # a slower peer is not a regression of ours
