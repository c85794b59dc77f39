"""The table of a workload's measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from palladion.benchmarks.measure.records import Limits, Measurement
from palladion.benchmarks.measure.samples import Samples, ratio
from palladion.benchmarks.text import amount, duration

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


def by_workload(measurements: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    """Groups measurements by workload, in the order of first appearance; yields a title and the group."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.operation, one.workload), []).append(one)
    for (operation, workload), group in groups.items():
        yield f"{operation} {workload}", group


def cells(measurements: Sequence[Measurement], limits: Limits) -> list[tuple[str, ...]]:
    """Formats the measurements of one workload, a line for each; contenders without a time show the reason."""
    reference = next((one.samples for one in measurements if one.kind == "reference"), None)
    peers = [one.samples for one in measurements if one.kind == "peer" and one.samples is not None]
    fastest_peer = min(peers, key=lambda samples: samples.median, default=None)
    return [_cells(one, limits, reference, fastest_peer) for one in measurements]


def _cells(
    measurement: Measurement, limits: Limits, reference: Samples | None, peer: Samples | None
) -> tuple[str, ...]:
    samples, units = measurement.samples, measurement.units
    error = "" if units is None else "exact" if units == 0 else f"{units:.2g}"
    if samples is None:
        prefix = {"wrong": "WRONG: ", "untimed": "right; "}.get(measurement.status, "")
        reason = prefix + measurement.reason
        return (measurement.contender, "-", reason, *[""] * 5, error, "", "", measurement.config)
    achieved, share = measurement.achieved or 0.0, measurement.share_of_bandwidth
    flops = measurement.flops
    compute_bound = measurement.bytes and flops / measurement.bytes > limits.matrix_rate / limits.bandwidth
    datasheet = limits.datasheet_bandwidth
    return (
        measurement.contender,
        duration(samples.median),
        f"{duration(samples.p20)} to {duration(samples.p80)}{' noisy' if samples.noisy else ''}",
        amount(measurement.bytes),
        f"{achieved / 1e9:,.3g}" if achieved < 1e12 else f"{achieved / 1e9:,.0f}",
        "" if share is None else f"{share:.0%}",
        "" if datasheet is None else f"{achieved / datasheet:.0%}",
        f"{flops / samples.median / 1e12:.3g}" if compute_bound else "",
        error,
        "" if reference is None else f"{ratio(reference, samples):.2f}",
        "" if peer is None else f"{ratio(peer, samples):.2f}",
        f"{measurement.config} ({measurement.config_source})" if measurement.config else "",
    )
