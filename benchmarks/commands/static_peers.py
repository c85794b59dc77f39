r"""Compares our kernels with others' on TPUs that are not there: estimates from compiled schedules, no measurements.

  python -m palladion.benchmarks static_peers
  python -m palladion.benchmarks static_peers --contests='decode_attention/8x4096*' --chips=v6e --json=peers.json
  python -m palladion.benchmarks static_peers --known=peers.json --json=peers.json

Every contender is compiled by the same libtpu for the same shape, in a process of its own, and its schedule is examined
in the same way. JAX's own kernels come with JAX; for the others:

  pip install --no-deps tpu-inference tokamax

Compiling everything takes hours, most of it for others' kernels: --contenders and --most-seconds limit it. The JSON
file is written after every kernel. With --known, others' results in the file of an earlier run with the same versions
are taken over; ours are examined again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from palladion.benchmarks.commands import options
from palladion.benchmarks.static.examiner import MOST_SECONDS, Examiner
from palladion.benchmarks.static.peers import estimates, packages, table
from palladion.benchmarks.static.peers.by_name import CONTESTS
from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips
from palladion.model.exit_status import INTERRUPTED

HELP: Final = "compares our TPU kernels with others' by the compiler's schedule, without a chip; estimates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    chips = tuple(tpu_chips())
    parser.add_argument("--contests", type=options.names, default=("*",), metavar="NAMES", help="names or patterns (*)")
    parser.add_argument(
        "--contenders", type=options.names, default=("*",), metavar="NAMES", help="whose kernels (*); ours always"
    )
    parser.add_argument(
        *("--most-seconds", "--most_seconds"),
        type=float,
        default=MOST_SECONDS,
        metavar="N",
        help=f"the longest that a kernel may take to compile ({MOST_SECONDS:.0f})",
    )
    parser.add_argument("--chips", type=options.names, default=chips, metavar="NAMES", help=", ".join(chips))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    parser.add_argument(
        "--known", type=options.names, default=(), metavar="FILES", help="of earlier runs: others' figures are reused"
    )
    parser.add_argument("--list", action="store_true", help="only list the contests")


def run(arguments: argparse.Namespace) -> int:
    """Holds the contests, prints a table of each and a summary, and writes the JSON file."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    check(arguments.most_seconds >= 1, "--most-seconds", arguments.most_seconds, "at least 1")
    chosen = _chosen(arguments)
    if arguments.list:
        print("\n".join(contest.name for contest in chosen))
        return 0
    if not tpu_compiler.installed():
        raise ImportError("libtpu is not installed, the TPU compiler: pip install libtpu")
    versions = packages.versions([*packages.COMPILERS, *packages.MODULES])
    known = _known(arguments.known, versions)
    missing = [package for package in packages.MODULES if not packages.installed(package)]
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for package in missing:
        print(f"{package} is left out, it is not installed: {packages.how_to_get(package)}")
    found: list[estimates.Estimate] = []
    interrupted = False
    with Examiner(arguments.most_seconds) as examiner:
        try:
            for so_far in _hold(chosen, examiner, missing, known, arguments):
                found = so_far
                if arguments.json:
                    arguments.json.write_text(json.dumps(record(versions, missing, found), indent=1) + "\n")
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted", file=sys.stderr)
    print("", *table.summary(chosen, found), "", table.LEGEND, sep="\n")
    return INTERRUPTED if interrupted else 0


def _hold(
    chosen: Sequence[Contest],
    examiner: Examiner,
    missing: Sequence[str],
    known: Sequence[estimates.Estimate],
    arguments: argparse.Namespace,
) -> Iterator[list[estimates.Estimate]]:
    """Holds contests and prints them; yields all results so far, after each."""

    def takes_part(contender: Contender) -> bool:
        named = any(fnmatch.fnmatchcase(contender.name, pattern) for pattern in (OURS, *arguments.contenders))
        return named and contender.package not in missing

    print(table.heading())
    done: list[estimates.Estimate] = []  # of earlier contests and chips
    current: list[estimates.Estimate] = []
    shown = None
    for contest, chip, on_chip in estimates.hold_contests(
        chosen, arguments.chips, examiner, takes_part=takes_part, known=known
    ):
        if current and (current[0].contest, current[0].chip) != (contest.name, chip):
            done += current
            shown = _show(current, shown)
        current = list(on_chip)
        yield done + current
    _show(current, shown)


def _show(on_chip: Sequence[estimates.Estimate], before: str | None) -> str | None:
    """Prints the rows of a chip, under the contest's name where it is a new one; returns the contest's name."""
    if not on_chip:
        return before
    if on_chip[0].contest != before:
        print(f"\n{on_chip[0].contest}")
    print("\n".join(table.lines(on_chip)), flush=True)
    return on_chip[0].contest


def record(versions: dict[str, str], missing: Sequence[str], found: Sequence[estimates.Estimate]) -> dict[str, Any]:
    """Returns what `--json` writes."""
    return {
        "benchmark": "static_tpu_peers",
        "estimated": "from the schedules that libtpu compiles; nothing was measured",
        "versions": versions,
        "not_installed": list(missing),
        "results": [one.record() for one in found],
    }


def _chosen(arguments: argparse.Namespace) -> list[Contest]:
    """Returns the contests that the command line names.

    Raises:
      ValueError: a contest, contender or chip is not known; the message lists those that are.
    """
    chosen: dict[str, Contest] = {}
    for pattern in arguments.contests:
        matching = {name: contest for name, contest in CONTESTS.items() if fnmatch.fnmatchcase(name, pattern)}
        check(bool(matching), "--contests", pattern, "names or patterns of those that --list lists")
        chosen |= matching
    names = {contender.name for contest in CONTESTS.values() for contender in contest.contenders}
    for pattern in arguments.contenders:
        check(bool(fnmatch.filter(names, pattern)), "--contenders", pattern, ", ".join(sorted(names)))
    for chip in arguments.chips:
        check(chip in tpu_chips(), "--chips", chip, ", ".join(tpu_chips()))
    return list(chosen.values())


def _known(files: Sequence[str], versions: dict[str, str]) -> list[estimates.Estimate]:
    """Returns others' results in the files of earlier runs, which must have used the same versions."""
    found = []
    for name in files:
        earlier = json.loads(Path(name).read_text())
        for package in (*packages.COMPILERS, *packages.MODULES):
            if package != "palladion":
                given, here = earlier["versions"].get(package), versions.get(package)
                check(given == here or here is None, f"--known={name}", f"{package} {given}", f"{package} {here}")
        found += [estimates.from_record(one) for one in earlier["results"]]
    return [one for one in found if not one.is_ours]
