r"""Ours beside others' kernels on TPUs that are not there: estimates from compiled schedules, no measurements.

  python -m palladion.benchmarks.static.peers
  python -m palladion.benchmarks.static.peers --contests='decode_attention/8x4096*' --chips=v6e --json=peers.json
  python -m palladion.benchmarks.static.peers --known=peers.json --json=peers.json

Every contender is compiled by the same libtpu for the same shape and judged by the same instrument, in a process of its
own. JAX's own kernels are there with JAX; for the others:

  pip install --no-deps tpu-inference tokamax

Compiling all takes hours, of which others' kernels take most: --contenders and --most_seconds choose. What is known is
written after every kernel; with --known, what is in the file of an earlier run with the same versions is not done
again, but for ours.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax
from absl import app, flags

from palladion.benchmarks.static.examiner import MOST_SECONDS as MOST_SECONDS_EACH
from palladion.benchmarks.static.examiner import Examiner
from palladion.benchmarks.static.peers import estimates as results
from palladion.benchmarks.static.peers import packages, table
from palladion.benchmarks.static.peers.by_name import CONTESTS
from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.kernels.checks import check
from palladion.kernels.devices import tpu_chips

CONTESTS_FLAG = flags.DEFINE_list("contests", ["*"], "Names of contests, or patterns of them.")
CONTENDERS = flags.DEFINE_list("contenders", ["*"], "Whose kernels, by name or pattern; ours always.")
MOST_SECONDS = flags.DEFINE_float("most_seconds", MOST_SECONDS_EACH, "What a kernel may take.", lower_bound=1.0)
CHIPS = flags.DEFINE_list("chips", list(tpu_chips()), "Generations to compile for.")
JSON = flags.DEFINE_string("json", None, "Also write every figure to this file.")
KNOWN = flags.DEFINE_list("known", [], "Files of earlier runs, whose figures of others are taken over.")
LIST = flags.DEFINE_bool("list", False, "Only list the contests.")

USER_ERROR: Final = 2
"""Exit status where what was asked for cannot be done."""

INTERRUPTED: Final = 130


def main(arguments: Sequence[str]) -> None:
    """Holds the contests and prints them; errors that the user can mend are one message and exit status 2."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip, even where there is one
    try:
        check(len(arguments) == 1, "arguments", " ".join(arguments[1:]), "flags only")
        chosen = _chosen()
        if LIST.value:
            print("\n".join(contest.name for contest in chosen))
            return
        if not tpu_compiler.installed():
            raise ImportError("libtpu is not installed, the TPU compiler: pip install libtpu")
        versions = packages.versions([*packages.COMPILERS, *packages.MODULES])
        known = _known(versions)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    missing = [package for package in packages.MODULES if not packages.installed(package)]
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for package in missing:
        print(f"{package} is left out, it is not installed: {packages.how_to_get(package)}")
    found: list[results.Result] = []
    interrupted = False
    with Examiner(MOST_SECONDS.value) as examiner:
        try:
            for so_far in _hold(chosen, examiner, missing, known):
                found = so_far
                if JSON.value:
                    Path(JSON.value).write_text(json.dumps(record(versions, missing, found), indent=1) + "\n")
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted", file=sys.stderr)
    print("", *table.summary(chosen, found), "", table.LEGEND, sep="\n")
    if interrupted:
        sys.exit(INTERRUPTED)


def _hold(
    chosen: Sequence[Contest], examiner: Examiner, missing: Sequence[str], known: Sequence[results.Result]
) -> Iterator[list[results.Result]]:
    """Holds contests and prints them; yields all results so far, after each."""

    def takes_part(contender: Contender) -> bool:
        named = any(fnmatch.fnmatchcase(contender.name, pattern) for pattern in (OURS, *CONTENDERS.value))
        return named and contender.package not in missing

    print(table.heading())
    before: list[results.Result] = []  # of contests and chips that are done
    now: list[results.Result] = []
    shown = None
    for contest, chip, on_chip in results.run(chosen, CHIPS.value, examiner, takes_part=takes_part, known=known):
        if now and (now[0].contest, now[0].chip) != (contest.name, chip):
            before += now
            shown = _show(now, shown)
        now = list(on_chip)
        yield before + now
    _show(now, shown)


def _show(on_chip: Sequence[results.Result], before: str | None) -> str | None:
    """Prints the rows of a chip, under the contest's name where it is a new one; returns the contest's name."""
    if not on_chip:
        return before
    if on_chip[0].contest != before:
        print(f"\n{on_chip[0].contest}")
    print("\n".join(table.lines(on_chip)), flush=True)
    return on_chip[0].contest


def record(versions: dict[str, str], missing: Sequence[str], found: Sequence[results.Result]) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "benchmark": "static_tpu_peers",
        "estimated": "from the schedules that libtpu compiles; nothing was measured",
        "versions": versions,
        "not_installed": list(missing),
        "results": [one.record() for one in found],
    }


def _chosen() -> list[Contest]:
    chosen: dict[str, Contest] = {}
    for pattern in CONTESTS_FLAG.value:
        meant = {name: contest for name, contest in CONTESTS.items() if fnmatch.fnmatchcase(name, pattern)}
        check(bool(meant), "--contests", pattern, "names or patterns of those that --list lists")
        chosen |= meant
    names = {contender.name for contest in CONTESTS.values() for contender in contest.contenders}
    for pattern in CONTENDERS.value:
        check(bool(fnmatch.filter(names, pattern)), "--contenders", pattern, ", ".join(sorted(names)))
    for chip in CHIPS.value:
        check(chip in tpu_chips(), "--chips", chip, ", ".join(tpu_chips()))
    return list(chosen.values())


def _known(versions: dict[str, str]) -> list[results.Result]:
    """What earlier runs found of others, with the same versions."""
    found = []
    for name in KNOWN.value:
        earlier = json.loads(Path(name).read_text())
        for package in (*packages.COMPILERS, *packages.MODULES):
            if package != "palladion":
                given, here = earlier["versions"].get(package), versions.get(package)
                check(given == here or here is None, f"--known={name}", f"{package} {given}", f"{package} {here}")
        found += [results.from_record(one) for one in earlier["results"]]
    return [one for one in found if not one.is_ours]


if __name__ == "__main__":
    app.run(main)
