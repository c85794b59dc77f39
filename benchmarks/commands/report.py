r"""Makes a Markdown page of results: tables, pictures, and where they come from.

  python -m palladion.benchmarks report benchmarks/results/cpu/*.jsonl --out=benchmarks/results/cpu/README.md

It takes files that `run --json`, `model --json` and `decode_peers --json` have written, and tuned block sizes. Pictures
go beside the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.commands import decode_peers, model
from palladion.benchmarks.measure import plots, records, tables
from palladion.benchmarks.measure.records import Limits, Measurement, Provenance
from palladion.benchmarks.plotting import require_matplotlib
from palladion.benchmarks.text import duration
from palladion.kernels import tuning
from palladion.kernels.checks import check

HELP: Final = "makes a Markdown page with tables and pictures of files of results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("files", type=Path, nargs="+", help="written by run, model, decode_peers and tune")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.md", help="the page; pictures go beside it")
    parser.add_argument("--title", default="Measurements", help="of the page")
    parser.add_argument("--without-pictures", action="store_true", help="tables only: needs no matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; a file that cannot be read, because it was cut off for example, costs its own section."""
    for path in arguments.files:
        check(path.is_file(), "files", path, "files that exist")
    if not arguments.without_pictures:
        require_matplotlib()
    sections: list[str] = []
    unread = 0
    for path in arguments.files:
        try:
            sections.append(_section(path, arguments))
        except (ValueError, KeyError, TypeError) as error:
            unread += 1
            sections.append(f"## {path.name}\n\nCannot be read: {type(error).__name__}: {error}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n\n".join([f"# {arguments.title}", *sections]) + "\n")
    print(f"wrote {arguments.out}{f', without {unread} files that cannot be read' if unread else ''}")
    return 1 if unread else 0


def _section(path: Path, arguments: argparse.Namespace) -> str:
    """Returns the section of the page for a file."""
    record = records.read_record(path)
    for key, section in _RECORDS.items():
        if record is not None and key in record:
            return section(path, record, arguments)
    provenance, limits, measurements = records.read(path)
    operations = list(dict.fromkeys(one.operation for one in measurements))
    parts = [f"## {', '.join(operations)} ({path.name})", _origin(provenance, limits)]
    if not arguments.without_pictures:
        picture = arguments.out.parent / f"{path.stem}-bandwidth.png"
        plots.bandwidth(measurements, provenance["device"], picture)
        parts.append(f"![bandwidth]({picture.name})")
        if any(one.flops and one.samples for one in measurements):
            picture = arguments.out.parent / f"{path.stem}-roofline.png"
            plots.roofline(measurements, limits, provenance["device"], picture)
            parts.append(f"![roofline]({picture.name})")
    parts += _tables(measurements, limits)
    parts.append(f"```\n{tables.LEGEND}\n```")
    return "\n\n".join(parts)


def _model_section(path: Path, record: dict[str, Any], arguments: argparse.Namespace) -> str:
    parts = [f"## {record['model']} ({path.name})", _origin(record["provenance"], Limits(**record["limits"]))]
    if not arguments.without_pictures:
        picture = arguments.out.parent / f"{path.stem}-scaling.png"
        plots.scaling(model.scaling_points(record), record["provenance"]["device"], record["title"], picture)
        parts.append(f"![scaling]({picture.name})")
    parts.append(markdown(*model.table_of(record)))
    for point in model.points_of(record):
        if point.kernels:
            parts.append(f"Where a step of {point.batch} sequences spends its time:")
            parts.append(markdown(model.KERNEL_HEADINGS, model.kernel_lines(point)))
    return "\n\n".join(parts)


def _decoders_section(path: Path, record: dict[str, Any], arguments: argparse.Namespace) -> str:
    title = f"{record['model']}, {record['tokens']} tokens of one sequence"
    parts = [f"## {title} ({path.name})", _origin(record["provenance"], Limits(**record["limits"]))]
    if not arguments.without_pictures:
        picture = arguments.out.parent / f"{path.stem}-decoders.png"
        plots.decoders(record["tokens_per_second"], record["provenance"]["device"], title, picture)
        parts.append(f"![decoders]({picture.name})")
    return "\n\n".join([*parts, markdown(*decode_peers.table_of(record)), record.get("rounds", "")]).rstrip()


def _named(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _tuned_section(path: Path, record: dict[str, Any], arguments: argparse.Namespace) -> str:
    del record, arguments
    entries = sorted(tuning.load(path), key=lambda one: (one.kind, tuple(one.sizes.items()), one.seconds))
    lines = [
        (
            f"{one.kind} {_named(one.sizes)}",
            one.implementation,
            duration(one.seconds),
            one.clock or one.origin,
            _named(one.config or {}),
        )
        for one in entries
    ]
    title = f"## Tuned: {path.parent.name} ({path.name})"
    return "\n\n".join((title, markdown(("problem", "implementation", "time of a call", "clock", "blocks"), lines)))


_RECORDS: Final[dict[str, Callable[[Path, dict[str, Any], argparse.Namespace], str]]] = {
    "points": _model_section,
    "tokens_per_second": _decoders_section,
    "entries": _tuned_section,
}
"""Functions that make the section of a record, by the key that tells its kind."""


def _origin(provenance: Provenance, limits: Limits) -> str:
    """Says where, when and with what a file was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    measured = (
        f"{provenance['device']}, measured: {limits.bandwidth / 1e9:,.1f} GB/s, "
        f"{limits.matrix_rate / 1e12:.3g} TFLOP/s in {limits.matrix_dtype}."
    )
    sheet = (
        f" Datasheet: {limits.datasheet_bandwidth / 1e9:,.0f} GB/s." if limits.datasheet_bandwidth is not None else ""
    )
    driver = f" Driver: {provenance['driver']}." if provenance.get("driver") else ""
    load = f" Load when it began: {provenance['load']} on {provenance['cores']} cores." if provenance["load"] else ""
    when = f"{provenance['time']}, commit {provenance['commit']}; {versions}."
    return f"{measured}{sheet}{driver}{load} {when}\n\n    {provenance['command']}"


def _tables(measurements: Sequence[Measurement], limits: Limits) -> Iterator[str]:
    for title, group in tables.by_workload(measurements):
        shown = [one for one in group if one.status != "skipped"]
        yield f"**{title}** ({group[0].shape})"
        yield markdown(tables.HEADINGS, tables.cells(shown, limits))


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown, without empty columns."""
    used = [n for n in range(len(headings)) if n == 0 or any(line[n] for line in lines)]
    escaped = [[line[n].replace("|", "\\|") for n in used] for line in lines]
    return "\n".join(
        (
            "| " + " | ".join(headings[n] for n in used) + " |",
            "|" + "|".join("---" if n == 0 else "--:" for n in used) + "|",
            *("| " + " | ".join(line) + " |" for line in escaped),
        )
    )
