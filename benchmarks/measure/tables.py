"""The table of a workload's measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from palladion.benchmarks.measure.records import Limits, Measurement, by_the_same_clock
from palladion.benchmarks.measure.samples import ratio
from palladion.benchmarks.text import amount, duration

HEADINGS: Final = (
    "contender",
    "time",
    "p20 to p80",
    "device",
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
time          median of a call by wall clock, over samples taken in turns with the others
device        median time of a call's kernels, from the profiler; rates and ratios rest on it where it is known
moves         bytes that must move between memory and chip, whatever a contender moves
of measured   bytes that must move over the time, in parts of the bandwidth that was measured in between
TFLOP/s       where arithmetic, not memory, sets the limit
error         largest error beside a float64 oracle, in parts of what is accepted: up to 1 is right
x xla, x peer how many times as fast as the reference, and as the fastest peer"""


def by_workload(measurements: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    """Groups measurements by workload, in the order of first appearance; yields a title and the group."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.operation, one.workload), []).append(one)
    for (operation, workload), group in groups.items():
        yield f"{operation} {workload}", group


def cells(measurements: Sequence[Measurement], limits: Limits) -> list[tuple[str, ...]]:
    """Formats the measurements of one workload, a line for each; contenders without a time show the reason."""
    reference = next((one for one in measurements if one.kind == "reference"), None)
    peers = [(one.best_samples.median, one) for one in measurements if one.kind == "peer" and one.best_samples]
    _, fastest_peer = min(peers, key=lambda peer: peer[0], default=(0.0, None))
    return [_cells(one, limits, reference, fastest_peer) for one in measurements]


def _cells(
    measurement: Measurement, limits: Limits, reference: Measurement | None, peer: Measurement | None
) -> tuple[str, ...]:
    samples, device, units = measurement.samples, measurement.device_samples, measurement.units
    error = "" if units is None else "exact" if units == 0 else f"{units:.2g}"
    if samples is None:
        prefix = {"wrong": "WRONG: ", "untimed": "right; "}.get(measurement.status, "")
        reason = prefix + measurement.reason
        return (measurement.contender, "-", reason, *[""] * 6, error, "", "", measurement.config)
    achieved, share = measurement.achieved or 0.0, measurement.share_of_bandwidth
    flops = measurement.flops
    compute_bound = measurement.bytes and flops / measurement.bytes > limits.matrix_rate / limits.bandwidth
    datasheet = limits.datasheet_bandwidth
    return (
        measurement.contender,
        duration(samples.median),
        f"{duration(samples.p20)} to {duration(samples.p80)}{' noisy' if samples.noisy else ''}",
        "" if device is None else f"{duration(device.median)} ±{device.spread / 2:.1%}",
        amount(measurement.bytes),
        f"{achieved / 1e9:,.3g}" if achieved < 1e12 else f"{achieved / 1e9:,.0f}",
        "" if share is None else f"{share:.0%}",
        "" if datasheet is None else f"{achieved / datasheet:.0%}",
        f"{flops / (device or samples).median / 1e12:.3g}" if compute_bound else "",
        error,
        _times_as_fast(measurement, reference),
        _times_as_fast(measurement, peer),
        f"{measurement.config} ({measurement.config_source})" if measurement.config else "",
    )


def _times_as_fast(measurement: Measurement, other: Measurement | None) -> str:
    samples = None if other is None else by_the_same_clock(other, measurement)
    return "" if samples is None else f"{ratio(*samples):.2f}"
