r"""Everything that this machine can say of the kernels, in so many minutes, as data in one folder.

  PYTHONPATH=src python -m palladion.benchmarks suite --minutes=10 --out=results

needs jax with the accelerator's plugin, numpy and absl-py; with matplotlib there are pictures, with torch more peers.
Phase by phase, each a command of its own in a process of its own: is every kernel right on this device? how fast is it
beside the reference and the peers that are installed? which block sizes are better? what does a decode step of a model
take, and where does its time go? Each phase has its share of the minutes, and what it leaves goes to the next ones; one
that takes longer is interrupted, and what it has measured is kept. --tiny goes through all of it on a CPU, with small
shapes and interpreted kernels: to see that it works.
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
from typing import Final

import palladion
from palladion.benchmarks.measure import bench, machine
from palladion.kernels import tuning
from palladion.kernels.checks import check

HELP: Final = "everything this machine can say in --minutes: right? how fast? better block sizes? a decode step?"

LEAST_SECONDS: Final = 15.0
"""Of a phase: with less left it is not begun."""

GRACE_SECONDS: Final = 20.0
"""From an interruption to the end."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A command, and its share of the time.

    Attributes:
      name: of its files.
      weight: of the time that is left, in parts of the weights that are left; on a GPU the seconds that it should take.
      command: its arguments, run in the folder of results; "{name}" is its name, "{minutes}" what it has of them.
    """

    name: str
    weight: float
    command: tuple[str, ...]


def phases(platform: str, *, tiny: bool) -> list[Phase]:
    """What is run on a platform, in order."""
    if tiny:
        return _tiny()
    if platform == "cpu":
        return _on_cpu()
    attention = ("run", "decode_attention", "--model=llama3-8b", "--rounds=9")
    product = ("run", "quantized_matmul", "--model=llama3-8b", "--rounds=9", "--layers=qkv,down")
    model = (
        "model",
        "--model=llama3-8b",
        "--prompt=1024",
        "--steps=64",
        "--minutes={minutes}",
        "--profile={name}",
    )
    tune = ("tune", "--trials=30", "--minutes={minutes}")
    # What is appended costs the same in a short cache, which is filled and compared in less time.
    append = ("--model=llama3-8b", "--batch=1,64", "--kv-len=1024", "--json={name}.jsonl")
    return [
        Phase("check", 60, ("check", "--minutes={minutes}", "--json={name}.jsonl")),
        Phase("attention", 70, (*attention, "--batch=1,8,32", "--kv-len=8192", "--json={name}.jsonl")),
        Phase("products", 110, (*product, "--scheme=int8,int4-g128", "--rows=1,16,256", "--json={name}.jsonl")),
        Phase("dense", 30, ("run", "matmul", "--model=llama3-8b", "--peers=none", "--json={name}.jsonl")),
        Phase("model-int8", 50, (*model, "--scheme=int8", "--batch=1,8", "--json={name}.json")),
        Phase("model-bfloat16", 50, (*model, "--scheme=bfloat16", "--batch=1,8", "--json={name}.json")),
        Phase("tune-attention", 40, (*tune, "decode_attention", "--model=llama3-8b", "--batch=1,8", "--kv-len=8192")),
        Phase(
            "tune-products",
            100,
            (*tune, "quantized_matmul", "--scheme=int8,int4-g128", "--rows=1,16", "--layers=qkv,down"),
        ),
        Phase("caches", 30, (*attention, "--batch=8", "--kv-dtype=int8,float8_e4m3fn", "--json={name}.jsonl")),
        Phase("pages", 20, (*attention, "--batch=8", "--page-size=64", "--ragged", "--json={name}.jsonl")),
        Phase("append", 20, ("run", "append_kv", *append)),
        Phase("append-joined", 20, ("run", "append_qkv", *append)),
    ]


def _on_cpu() -> list[Phase]:
    """The reference and its peers on a CPU; float32 is what its arithmetic is."""
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
            ("model", "--scheme=int8", "--prompt=16", "--steps=32", "--minutes={minutes}", "--json={name}.json"),
        ),
        Phase("decode", 3, ("decode_peers", "--rounds=3", "--tokens=64", "--json={name}.json")),
    ]


def _tiny() -> list[Phase]:
    """Every phase, with interpreted kernels and shapes that take a second."""
    heads = ("--q-heads=4", "--kv-heads=2", "--head-dim=64", "--dtype=float32", "--kv-len=128", "--batch=2")
    layer = ("--in=128", "--out=128", "--rows=2", "--dtype=float32", "--scheme=int8")
    quick = ("--interpret", "--rounds=2", "--sample-ms=1", "--json={name}.jsonl", "--peers=jax-nn-xla,dense-dot")
    tune = ("tune", "--interpret", "--trials=2", "--minutes={minutes}")
    return [
        Phase(
            "check",
            1,
            ("check", "--interpret", "--cases=gqa,int8,float32", "--minutes={minutes}", "--json={name}.jsonl"),
        ),
        Phase("attention", 1, ("run", "decode_attention", *heads, *quick)),
        Phase("products", 1, ("run", "quantized_matmul", *layer, *quick)),
        Phase("dense", 1, ("run", "matmul", *(one for one in layer if "scheme" not in one), *quick)),
        Phase("append", 1, ("run", "append_kv", *(one for one in heads if "q-heads" not in one), *quick)),
        Phase("append-joined", 1, ("run", "append_qkv", *heads, *quick)),
        Phase("tune-products", 1, (*tune, "quantized_matmul", *layer)),
        Phase(
            "model-int8",
            1,
            (
                *("model", "--model=tiny", "--batch=1,2", "--prompt=8", "--steps=16", "--backend=mosaic_tpu"),
                *("--interpret", "--minutes={minutes}", "--json={name}.json", "--profile={name}"),
            ),
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for everything (10)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where all results go")
    parser.add_argument("--only", metavar="NAMES", help="phases, with commas between")
    parser.add_argument("--tiny", action="store_true", help="small shapes and interpreted kernels, on a CPU")


def run(arguments: argparse.Namespace) -> int:
    """Runs the phases; returns 1 where one of them failed."""
    check(arguments.minutes > 0, "--minutes", arguments.minutes, "more than 0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a process after the other, and this one
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
    """The platform of JAX's default device, asked in a process of its own: this one takes nothing of a GPU's memory."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    if said.returncode:
        raise ImportError(f"jax does not start: {said.stderr.strip().splitlines()[-1]}")
    return said.stdout.strip().splitlines()[-1]


def run_phases(chosen: Sequence[Phase], out: Path, minutes: float, *, tiny: bool) -> int:
    """Runs phases one after the other, each within its share of what is left.

    Args:
      chosen: in order.
      out: where results and logs go; `suite.json` says what became of each phase.
      minutes: for everything.
      tiny: on the CPU whatever else is here.

    Returns:
      0, or 1 where a phase failed or could not begin.
    """
    deadline = time.perf_counter() + 60 * minutes
    summary: list[dict[str, object]] = []
    try:
        for number, phase in enumerate(chosen):
            left = bench.seconds_left(deadline)
            share = left * phase.weight / sum(one.weight for one in chosen[number:])
            if left < LEAST_SECONDS and not tiny:
                status: int | str = "no time left"
                seconds = 0.0
            else:
                start = time.perf_counter()
                status = _run_phase(phase, out, share, tiny=tiny)
                seconds = time.perf_counter() - start
            bench.progress(f"--- {phase.name}: {'done' if status == 0 else status} after {seconds:.0f} s")
            summary.append({"phase": phase.name, "status": status, "seconds": round(seconds, 1)})
            # Written after each: an interrupted suite has said what it did.
            (out / "suite.json").write_text(
                json.dumps({"minutes": minutes, "commit": machine.commit(), "phases": summary}, indent=1) + "\n"
            )
    finally:
        _report(out, [phase.name for phase in chosen])
    return 0 if all(entry["status"] == 0 for entry in summary) else 1


def _run_phase(phase: Phase, out: Path, seconds: float, *, tiny: bool) -> int | str:
    """Runs a command; its words go to the terminal and to a log. Returns its exit status, or what went wrong."""
    minutes = f"{max(seconds - GRACE_SECONDS, seconds / 2) / 60:.2f}"
    given = [part.format(minutes=minutes, name=phase.name) for part in phase.command]
    bench.progress(f"\n=== {phase.name}, {seconds:.0f} s: {shlex.join(given)}")
    # Found from another folder, too, where PYTHONPATH is relative.
    here = [str(Path(palladion.__file__).absolute().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        tuning.CACHE: os.environ.get(tuning.CACHE, str(out)),
        "PYTHONPATH": os.pathsep.join(filter(None, here)),
    }
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "palladion.benchmarks", *given]
    with (out / f"{phase.name}.log").open("w") as log:
        # A group of its own: what it starts is interrupted with it.
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
    """Interrupts a command, which keeps what it has, and ends it if it does not."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                continue


def _report(out: Path, names: Sequence[str]) -> None:
    """The page of everything that phases have written, in their order, where there is anything."""
    from palladion.benchmarks.commands import report

    # A check has no times.
    files = [path for name in names if name != "check" for path in sorted(out.glob(f"{name}.json*"))]
    if not files:
        return
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    bare = [] if importlib.util.find_spec("matplotlib") else ["--without-pictures"]
    try:
        report.run(parser.parse_args([*map(str, files), f"--out={out / 'README.md'}", *bare]))
    except ValueError as error:  # a file that was cut off
        bench.progress(f"no page: {error}")
