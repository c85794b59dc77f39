r"""Tunes and measures everything of a machine within a time limit, most valuable first, into one folder.

  PYTHONPATH=src python -m palladion.benchmarks suite --minutes=6 --out=results

It needs jax with the accelerator's plugin and numpy; matplotlib adds pictures, torch and others add peers.
Each phase is a command in a process of its own. On an accelerator: are kernels right on this device; how fast are
products and attention of Llama-3-8B, as they come; which block sizes, or XLA's form, are best for them; how long is a
decode step, with what was tuned; how fast is the rest beside peers; and last, beside peers that compile for long. A
phase gets its share of the minutes that are left, and leaves what it does not need to the next ones; a phase that takes
longer is interrupted, and what it has measured is kept. Results are written as they come: the tuned block sizes to
tuned/, and the page README.md after every phase. --tiny runs all phases on a CPU, with small shapes and interpreted
kernels, to try them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import palladion
from palladion.benchmarks.commands import report
from palladion.benchmarks.commands.progress import report_progress, seconds_left
from palladion.benchmarks.measure import machine
from palladion.kernels import compilation_cache, tuning
from palladion.kernels.checks import check

HELP: Final = "everything this machine can say in --minutes: right? which block sizes? a decode step? how fast?"

LEAST_SECONDS: Final = 10.0
"""Time that must be left for a phase to begin."""

GRACE_SECONDS: Final = 10.0
"""Time that a phase has between an interruption and its end, and that it should end before its share is over."""

PAGE_SECONDS: Final = 10.0
"""Time for the page and its pictures after the last phase."""

TUNED_PAGES: Final = ("--batch=8", "--kv-len=4096", "--page-size=64", "--ragged")
"""A paged cache with sequences of different lengths."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A command, and its share of the time.

    Attributes:
      name: name of its files.
      weight: its share of the remaining time, relative to the weights of the phases that follow; on a GPU the seconds
        that it should take.
      command: the command line, run in the folder of results; "{name}" and "{minutes}" are filled in.
    """

    name: str
    weight: float
    command: tuple[str, ...]


def phases(platform: str, *, tiny: bool) -> list[Phase]:
    """Returns the phases for a platform, in order."""
    if tiny:
        return _tiny()
    return _on_cpu() if platform == "cpu" else [*_first(), *_tuning(), *_models(), *_contests()]


def _first() -> list[Phase]:
    """Returns the check of all kernels, and what takes little time and says most: their speed beside XLA's form."""
    quick = ("run", "--model=llama3-8b", "--peers=none", "--rounds=5", "--sample-ms=2", "--json={name}.jsonl")
    products = ("--rows=1,16,256", "--scheme=int8,int4-g128", "--layers=qkv,down")
    attention = ("--batch=1,8", "--kv-len=8192", "--kv-dtype=bfloat16,int8,float8_e4m3fn")
    return [
        Phase("check", 35, ("check", "--minutes={minutes}", "--json={name}.jsonl")),
        Phase("products-first", 35, (*quick, "quantized_matmul", *products)),
        Phase("attention-first", 30, (*quick, "decode_attention", *attention)),
    ]


def _tuning() -> list[Phase]:
    """Returns the search for what is best for the layers and the attention of Llama-3-8B; a shape takes 20 seconds."""
    tune = ("tune", "--model=llama3-8b", "--minutes={minutes}")
    rows = "--rows=1,8"
    layers = ("--scheme=int8,int4-g128", "--layers=qkv,output,gate-up,down")
    narrow = "--kv-dtype=bfloat16,int8,float8_e4m3fn"
    return [
        Phase("tune-products", 160, (*tune, "quantized_matmul", *layers, rows)),
        Phase("tune-attention", 35, (*tune, "decode_attention", "--batch=1,8", "--kv-len=8192", narrow)),
        Phase("tune-pages", 12, (*tune, "decode_attention", *TUNED_PAGES)),
        Phase("tune-dense", 30, (*tune, "matmul", rows)),
    ]


def _models() -> list[Phase]:
    """Returns decode steps of the whole model, in three precisions."""
    step = ("model", "--model=llama3-8b", "--prompt=1024", "--steps=64", "--batch=1,8,32", "--minutes={minutes}")
    return [
        Phase(f"model-{scheme}", 30, (*step, f"--scheme={scheme}", "--json={name}.json"))
        for scheme in ("int8", "int4-g128", "bfloat16")
    ]


def _contests() -> list[Phase]:
    """Returns kernels beside the reference and peers; those that compile for long come last."""
    run = ("run", "--model=llama3-8b", "--rounds=5", "--sample-ms=5", "--json={name}.jsonl")
    attention, product = (*run, "decode_attention"), (*run, "quantized_matmul", "--layers=qkv,down")
    long = ("--batch=1,8", "--kv-len=8192")
    append = ("--batch=1,64", "--kv-len=1024")  # appending costs the same in a short cache, which is filled sooner
    slow = "--peers=slow"
    return [
        Phase("products", 30, (*product, "--scheme=int8,int4-g128", "--rows=1,16", "--peers=fast")),
        Phase("attention", 25, (*attention, *long, "--kv-dtype=bfloat16,int8,float8_e4m3fn", "--peers=fast")),
        Phase("dense", 12, (*run, "matmul", "--rows=1,16", "--peers=none")),
        Phase("pages", 12, (*attention, *TUNED_PAGES, "--peers=fast")),
        Phase("append", 10, (*run, "append_kv", *append)),
        Phase("append-joined", 10, (*run, "append_qkv", *append)),
        Phase("slow-attention", 15, (*attention, *long, slow)),
        Phase("slow-products", 15, (*product, "--scheme=int8,int4-g128", "--rows=1,16", slow)),
    ]


def _on_cpu() -> list[Phase]:
    """Returns the phases for a CPU: the reference and its peers, in float32 as CPUs compute."""
    small = ("--model=smollm2-135m", "--dtype=float32", "--rounds=5", "--json={name}.jsonl")
    return [
        Phase("attention", 2, ("run", "decode_attention", *small, "--batch=1,8", "--kv-len=2048")),
        Phase(
            "products",
            3,
            ("run", "quantized_matmul", *small, "--scheme=int8,int4-g32", "--rows=1,16", "--layers=qkv,down,head"),
        ),
        Phase("append", 1, ("run", "append_kv", *small, "--batch=8", "--kv-len=2048")),
        Phase(
            "model-int8",
            4,
            ("model", "--scheme=int8", "--prompt=16", "--steps=16", "--minutes={minutes}", "--json={name}.json"),
        ),
        Phase("decode", 3, ("decode_peers", "--rounds=3", "--tokens=64", "--json={name}.json")),
    ]


def _tiny() -> list[Phase]:
    """Returns every kind of phase with interpreted kernels and shapes that take a second."""
    heads = ("--q-heads=4", "--kv-heads=2", "--head-dim=64", "--dtype=float32", "--kv-len=128", "--batch=2")
    dense = ("--in=128", "--out=128", "--rows=2", "--dtype=float32")
    layer = (*dense, "--scheme=int8")
    quick = ("--interpret", "--rounds=2", "--sample-ms=1", "--json={name}.jsonl", "--peers=jax-nn-xla,dense-dot")
    tune = ("tune", "--interpret", "--trials=2", "--minutes={minutes}")
    cases = ("--cases=gqa,int8,float32", "--interpret", "--minutes={minutes}", "--json={name}.jsonl")
    model = ("--model=tiny", "--batch=1,2", "--prompt=8", "--steps=16", "--backend=mosaic_tpu", "--interpret")
    return [
        Phase("check", 1, ("check", *cases)),
        Phase("tune-products", 1, (*tune, "quantized_matmul", *layer)),
        Phase("tune-attention", 1, (*tune, "decode_attention", *heads)),
        Phase("model-int8", 1, ("model", *model, "--minutes={minutes}", "--json={name}.json")),
        Phase("products", 1, ("run", "quantized_matmul", *layer, *quick)),
        Phase("attention", 1, ("run", "decode_attention", *heads, *quick)),
        Phase("dense", 1, ("run", "matmul", *dense, *quick)),
        Phase("append", 1, ("run", "append_kv", *(one for one in heads if "q-heads" not in one), *quick)),
        Phase("append-joined", 1, ("run", "append_qkv", *heads, *quick)),
        Phase("slow-attention", 1, ("run", "decode_attention", *heads, *quick[:-1], "--peers=slow")),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--minutes", type=float, default=6.0, metavar="N", help="for all phases together (6)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for all results")
    parser.add_argument("--only", metavar="NAMES", help="names of phases, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small shapes and interpreted kernels, on a CPU")


def run(arguments: argparse.Namespace) -> int:
    """Runs the phases; returns 1 if one of them failed."""
    check(arguments.minutes > 0, "--minutes", arguments.minutes, "more than 0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = phases("cpu" if arguments.tiny else _platform(), tiny=arguments.tiny)
    if arguments.only:
        names = [phase.name for phase in chosen]
        for name in arguments.only.split(","):
            check(name in names, "--only", name, ", ".join(names))
        chosen = [phase for phase in chosen if phase.name in arguments.only.split(",")]
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return run_phases(chosen, out, arguments.minutes, tiny=arguments.tiny)


def _platform() -> str:
    """Returns the platform of JAX's default device.

    Another process asks for it, so that this one takes none of a GPU's memory.
    """
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    if said.returncode:
        raise ImportError(f"jax does not start: {said.stderr.strip().splitlines()[-1]}")
    return said.stdout.strip().splitlines()[-1]


def run_phases(chosen: Sequence[Phase], out: Path, minutes: float, *, tiny: bool) -> int:
    """Runs phases one after the other, each within its share of what is left.

    Args:
      chosen: the phases, in order.
      out: folder for results and logs; `suite.json` has the outcome of each phase.
      minutes: time for all phases together.
      tiny: runs on the CPU even if there is an accelerator, and without a time limit.

    Returns:
      The exit status: 1 if a phase failed or could not begin, otherwise 0.
    """
    deadline = time.perf_counter() + max(60 * minutes - PAGE_SECONDS, 30 * minutes)
    summary: list[dict[str, Any]] = []

    def note(phase: Phase, status: int | str, seconds: float) -> None:
        """Writes down what became of a phase, and the page, so that a suite that is ended later leaves them."""
        report_progress(f"--- {phase.name}: {_outcome(status)} after {seconds:.0f} s")
        summary.append({"phase": phase.name, "status": status, "seconds": round(seconds, 1)})
        (out / "suite.json").write_text(
            json.dumps({"minutes": minutes, "commit": machine.commit(), "phases": summary}, indent=1) + "\n"
        )
        _report(out, summary, pictures=False)

    try:
        for number, phase in enumerate(chosen):
            left = seconds_left(deadline)
            share = left * phase.weight / sum(one.weight for one in chosen[number:])
            if left < LEAST_SECONDS and not tiny:
                note(phase, "no time left", 0.0)
                continue
            start = time.perf_counter()
            try:
                status = _run_phase(phase, out, share, tiny=tiny)
            except KeyboardInterrupt:
                note(phase, "interrupted", time.perf_counter() - start)
                raise
            note(phase, status, time.perf_counter() - start)
    finally:
        _report(out, summary, pictures=importlib.util.find_spec("matplotlib") is not None)
    return 0 if all(entry["status"] == 0 for entry in summary) else 1


def _run_phase(phase: Phase, out: Path, seconds: float, *, tiny: bool) -> int | str:
    """Runs a phase, and prints and logs its output; returns its exit status, or why it was interrupted."""
    minutes = f"{max(seconds - GRACE_SECONDS, seconds / 2) / 60:.2f}"
    given = [part.format(minutes=minutes, name=phase.name) for part in phase.command]
    report_progress(f"\n=== {phase.name}, {seconds:.0f} s: {shlex.join(given)}")
    # The command runs in another folder, where a relative PYTHONPATH would not work.
    here = [str(Path(palladion.__file__).absolute().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        **compilation_cache.inherited(),
        tuning.CACHE: os.environ.get(tuning.CACHE, str(out)),
        "PYTHONPATH": os.pathsep.join(filter(None, here)),
    }
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "palladion.benchmarks", *given]
    with (out / f"{phase.name}.log").open("w") as log:
        # A session of its own, so that its child processes are interrupted with it.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=out
        )
        status: int | str
        try:
            status = process.wait(timeout=seconds if not tiny else None)
        except subprocess.TimeoutExpired:
            status = "interrupted: its time was over"
            _end(process)
        except BaseException:
            _end(process)
            raise
    print((out / f"{phase.name}.log").read_text(errors="replace"), flush=True)
    return status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a command, which then keeps what it has; kills it if it does not end."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                continue


def _outcome(status: object) -> str:
    """Says what became of a phase."""
    return "done" if status == 0 else f"exit status {status}" if isinstance(status, int) else str(status)


def _report(out: Path, summary: Sequence[dict[str, Any]], *, pictures: bool) -> None:
    """Makes the page of what the phases so far have written, in their order, if there is anything."""
    # A check measures no times.
    names = [phase["phase"] for phase in summary if phase["phase"] != "check"]
    files = [path for name in names for path in sorted(out.glob(f"{name}.json*"))]
    tuned = sorted((out / "tuned").rglob("*.json"))
    if not files and not tuned:
        return
    page = out / "README.md"
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    bare = [] if pictures else ["--without-pictures"]
    report.run(parser.parse_args([*map(str, [*files, *tuned]), f"--out={page}", *bare]))
    lines = [(phase["phase"], _outcome(phase["status"]), f"{phase['seconds']:.0f} s") for phase in summary]
    with page.open("a") as file:
        file.write(f"\n## Phases\n\n{report.markdown(('phase', 'outcome', 'took'), lines)}\n")
