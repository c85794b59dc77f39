"""Pictures of the studies' results: small PNG files for docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from palladion.benchmarks.numerics.tables import Record, method_name, run_length
from palladion.benchmarks.plotting import require_matplotlib

DOTS_PER_INCH: Final = 90

FRONT: Final = "tab:red"
"""Colour of the runs on the Pareto front."""

MANY_BITS: Final = 1.5
"""Bytes, in parts of the smallest run's, above which a run has more than 4 bits."""

SHOWN: Final = {
    "float32 + float32, one after the other": ("black", "-"),
    "bfloat16 + float32, one after the other": ("tab:blue", "-"),
    "bfloat16 + bfloat16, one after the other": ("tab:red", "-"),
    "bfloat16 + bfloat16, pairwise": ("tab:red", "--"),
    "bfloat16 + bfloat16, blocks of 128, then float32": ("tab:orange", "--"),
    "int8, one scale": ("tab:green", "-"),
    "int8, scale per 128": ("tab:green", "--"),
    "float8_e4m3fn, one scale": ("tab:purple", "-"),
    "float8_e5m2, one scale": ("tab:pink", "-"),
}
"""Methods in the picture of dot products, with colour and line style."""


def _pyplot() -> Any:
    require_matplotlib()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_sums(study: dict[str, Any], folder: Path) -> None:
    """Draws numerics-sums.png, the sums in different orders, and numerics-dots.png, errors by length."""
    pyplot = _pyplot()
    _draw_orders(pyplot, study["sums"], folder / "numerics-sums.png")
    pairs = list(dict.fromkeys(record["pair"] for record in study["dots"]))
    figure, axes = pyplot.subplots(1, len(pairs), figsize=(5.2 * len(pairs), 4.2), sharey=True, squeeze=False)
    for axis, pair in zip(axes[0], pairs, strict=True):
        for name, (color, style) in SHOWN.items():
            chosen = [r for r in study["dots"] if r["pair"] == pair and method_name(r) == name]
            lengths, errors = [r["length"] for r in chosen], [r["rms_error"] for r in chosen]
            axis.plot(lengths, errors, style, color=color, label=name)
        axis.set_xscale("log", base=2)
        axis.set(title=pair, xlabel="length", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("rms error / (|x| |w|)")
    axes[0][0].legend(fontsize=6.5, loc=(0.02, 0.1))
    _save(pyplot, figure, folder / "numerics-dots.png")


def _draw_orders(pyplot: Any, records: Sequence[Record], path: Path) -> None:
    chosen = [record for record in records if record["vector"] == "sin, in order"]
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for row, record in enumerate(chosen):
        axis.plot(
            np.array(record["shuffled"]) - record["exact"], [row] * len(record["shuffled"]), "|", color="tab:blue"
        )
        axis.plot(record["sum"] - record["exact"], row, "o", color="tab:red", markersize=4)
    axis.set_yticks(range(len(chosen)), [method_name(record) for record in chosen], fontsize=7)
    axis.set_xscale("symlog", linthresh=1e-5)
    axis.set_xticks([-10, -1e-1, -1e-3, 0, 1e-3, 1e-1, 10])
    axis.invert_yaxis()
    axis.axvline(0, color="gray", linewidth=0.5)
    axis.set_xlabel("error of the sum of sines in order (dot), in random orders (strokes)")
    axis.grid(axis="x", alpha=0.3)
    _save(pyplot, figure, path)


def draw_model(runs: dict[str, Record], folder: Path) -> None:
    """Draws numerics-model.png, quality over bytes, and numerics-cache.png, divergence of caches by position."""
    pyplot = _pyplot()
    figure, (axis, narrow) = pyplot.subplots(1, 2, figsize=(10.5, 5))
    weights = [run for run in runs.values() if run["kind"] == "weights"]
    best = pareto(weights)
    front = sorted((run for run in weights if run["name"] in best), key=lambda run: run["weight_bytes"])
    for run in weights:
        axis.plot(run["weight_bytes"] / 1e6, run["kl"], "o", color=_color(run, best), markersize=4)
    axis.step(
        [run["weight_bytes"] / 1e6 for run in front], [run["kl"] for run in front], where="post", color=FRONT, lw=0.7
    )
    for run in weights:
        if run["weight_bytes"] > MANY_BITS * min(run["weight_bytes"] for run in weights):
            place = (run["weight_bytes"] / 1e6, run["kl"])
            axis.annotate(run["name"], place, fontsize=7, xytext=(-4, 3), textcoords="offset points", ha="right")
    axis.set(yscale="log", xlabel="MB of weights that a step reads", ylabel="KL from float32, nats a token")
    axis.grid(alpha=0.3)

    few = [run for run in weights if run["weight_bytes"] <= MANY_BITS * min(run["weight_bytes"] for run in weights)]
    few.sort(key=lambda run: run["kl"])
    for row, run in enumerate(few):
        narrow.plot(run["kl"], row, "o", color=_color(run, best), markersize=5)
    names = [f"{run['name']}  {run['weight_bytes'] / 1e6:.1f} MB" for run in few]
    narrow.set_yticks(range(len(few)), names, fontsize=7)
    narrow.invert_yaxis()
    narrow.set(xscale="log", xlabel="KL; red: no other is both smaller and better")
    narrow.grid(alpha=0.3)
    _save(pyplot, figure, folder / "numerics-model.png")

    figure, axis = pyplot.subplots(figsize=(6.5, 3.8))
    for run in runs.values():
        if run["kind"] == "cache":
            positions = (np.arange(len(run["kl_by_position"])) + 0.5) * run_length(run)
            axis.semilogy(positions, run["kl_by_position"], "o-", label=run["name"].removeprefix("cache "))
    axis.set(xlabel="tokens before", ylabel="KL from float32, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="cache")
    _save(pyplot, figure, folder / "numerics-cache.png")


def _color(run: Record, best: set[str]) -> str:
    return FRONT if run["name"] in best else "tab:blue"


def pareto(runs: Sequence[Record]) -> set[str]:
    """Returns the names of the runs on the Pareto front of bytes and divergence."""

    def beaten(run: Record) -> bool:
        return any(other["weight_bytes"] <= run["weight_bytes"] and other["kl"] < run["kl"] for other in runs)

    return {run["name"] for run in runs if not beaten(run)}


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
