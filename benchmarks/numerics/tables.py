"""Tables of the studies' results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from palladion.benchmarks.text import table

Record = dict[str, Any]
"""A result of a study, as JSON has it."""


def method_name(record: Record) -> str:
    """Names the dtype of a vector, its accumulator and the order of its sum."""
    if record["accumulator"] == "exact":
        return f"{record['inputs']}, {record['order']}"
    return f"{record['inputs']} + {record['accumulator']}, {record['order']}"


def by_method(
    records: Sequence[Record], column: str, cell: Callable[[Record], str]
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and lines of a table with a line for each method and a column for each value of an entry."""
    heads = list(dict.fromkeys(record[column] for record in records))
    cells: dict[str, dict[Any, str]] = {}
    for record in records:
        cells.setdefault(method_name(record), {})[record[column]] = cell(record)
    return [str(head) for head in heads], [
        [name, *(row.get(head, "") for head in heads)] for name, row in cells.items()
    ]


def sums_tables(study: dict[str, Any]) -> str:
    """Formats the sums of sines, and the errors of the other sums, of dot products and of attention."""
    parts = []
    sines = [record for record in study["sums"] if record["vector"].startswith("sin")]
    heads, rows = by_method(sines, "vector", lambda record: f"{record['sum']:.4f}")
    spreads = {method_name(r): f"{(max(r['shuffled']) - min(r['shuffled'])):.3g}" for r in sines}
    rows = [[*row, spreads[row[0]]] for row in rows]
    exact = sines[0]["exact"]
    parts.append(
        f"Sum of sin(0) to sin(9999), exactly {exact:.4f}; and what {len(sines[0]['shuffled'])} other orders differ by"
    )
    parts.append(table(["inputs + accumulator, order of sums", *heads, "orders differ by"], rows))
    others = [record for record in study["sums"] if record["vector"] != "sin, shuffled"]
    heads, rows = by_method(others, "vector", lambda record: f"{record['rms_error']:.1e}")
    parts.append("Sums of 10,000 in random orders: root mean square error / root of the sum of squares")
    parts.append(table(["", *heads], rows))
    for pair in dict.fromkeys(record["pair"] for record in study["dots"]):
        chosen = [record for record in study["dots"] if record["pair"] == pair]
        heads, rows = by_method(chosen, "length", lambda record: f"{record['rms_error']:.1e}")
        parts.append(f"Dot products, {pair}, by length: root mean square error / (|x| |w|)")
        parts.append(table(["", *heads], rows))
    parts.append("Online softmax over 4096 tokens, by tokens in a block: root mean square error / that of the output")
    parts.append(_attention_table(study["attention"]))
    return "\n\n".join(parts)


def _attention_table(records: Sequence[Record]) -> str:
    blocks = list(dict.fromkeys(record["block"] for record in records))
    rows: dict[str, dict[int, str]] = {}
    for record in records:
        name = f"accumulators {record['accumulator']}, weights {record['weights']}, {record['splits']} splits"
        rows.setdefault(name, {})[record["block"]] = f"{record['rms_error']:.1e}"
    return table(
        ["", *map(str, blocks)], [[name, *(row.get(block, "") for block in blocks)] for name, row in rows.items()]
    )


MODEL_HEADING: Final = (
    f"{'':38s} {'MB a step':>9s} {'perplexity':>10s} {'KL':>9s} {'±':>8s} {'agreement':>9s} {'s':>6s}"
)


def model_line(run: Record) -> str:
    """Formats a run on one line."""
    return (
        f"{run['name']:38s} {run['weight_bytes'] / 1e6:9.1f} {run['perplexity']:10.2f} {run['kl']:9.5f} "
        f"{run['kl_standard_error']:8.5f} {run['agreement']:9.3f} {run['seconds']:6.0f}"
    )


def model_tables(runs: dict[str, Record]) -> str:
    """Formats all runs of a language model, and the divergence of caches by position."""
    lines = [MODEL_HEADING, *map(model_line, runs.values())]
    caches = [run for run in runs.values() if run["kind"] == "cache"]
    if caches:
        positions = [str((index + 1) * run_length(caches[0])) for index in range(len(caches[0]["kl_by_position"]))]
        rows = [[run["name"], *(f"{kl:.5f}" for kl in run["kl_by_position"])] for run in caches]
        lines += ["", "KL by position, up to", table(["", *positions], rows)]
    return "\n".join(lines)


def run_length(run: Record) -> int:
    """Returns the number of tokens that each entry of a run's `kl_by_position` averages."""
    return int(run["tokens"]) // len(run["kl_by_position"])
