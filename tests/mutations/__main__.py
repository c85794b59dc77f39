r"""Checks that the tests catch known one-line bugs; takes about half an hour on two cores.

  python -m tests.mutations
  python -m tests.mutations --only '*-semaphore' model-min-p-edge

Bugs are applied one at a time to a scratch copy of the repository. `results.json` keeps the outcome of each; the exit
status is 1 if a bug survived.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from pathlib import Path

from .bugs import MUTATIONS
from .runner import MutationError, check, commit_of, copy_sources, load, save

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="names, or patterns of names, instead of all")
    parser.add_argument("--timeout", type=float, default=400, help="seconds after which a run counts as failed")
    options = parser.parse_args()
    names = [mutation.name for mutation in MUTATIONS]
    for pattern in options.only:
        if not fnmatch.filter(names, pattern):
            parser.error(f"--only: got {pattern}, which matches none; accepted: patterns of {', '.join(names)}")
    chosen = [
        mutation
        for mutation in MUTATIONS
        if any(fnmatch.fnmatchcase(mutation.name, pattern) for pattern in options.only)
    ]
    results, broken, commit = load(RESULTS), [], commit_of(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_sources(ROOT, tree)
        for mutation in chosen:
            try:
                result = check(mutation, tree, timeout=options.timeout, commit=commit)
            except MutationError as error:
                broken.append(mutation.name)
                print(f"{'broken':8} {'':>7}   {error}", flush=True)
                continue
            results[mutation.name] = result
            save(RESULTS, MUTATIONS, results)
            print(
                f"{result.outcome:8} {result.seconds:5.1f} s   {mutation.name}: {result.by or mutation.bug}", flush=True
            )
    survived = [mutation.name for mutation in chosen if (r := results.get(mutation.name)) and r.outcome == "survived"]
    caught = len(chosen) - len(survived) - len(broken)
    print(f"{caught} caught, {len(survived)} survived, {len(broken)} broken")
    return 1 if survived or broken else 0


if __name__ == "__main__":
    sys.exit(main())
