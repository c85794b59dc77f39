r"""What each bit costs, from the sum of a vector to a language model.

  python -m palladion.benchmarks numerics sums        sums, dot products and attention in few bits; a minute
  python -m palladion.benchmarks numerics model       SmolLM2 under every scheme; goes on where it was interrupted
  python -m palladion.benchmarks numerics figures     tables and pictures from the results of both

Results are JSON in --results; --figures is the folder of the pictures. docs/numerics.md says what follows from them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from palladion.benchmarks.numerics import figures, language_model, sums, tables
from palladion.benchmarks.numerics.rounding import Array

HELP: Final = "what each bit costs: sums, dot products and attention in few bits; a language model under every scheme"

STUDIES: Final = ("sums", "model", "figures", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("study", choices=STUDIES, help="what to study")
    parser.add_argument("--model", default="smollm2", help="a checkpoint; 'smollm2' is packaged")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    parser.add_argument("--synthetic", action="store_true", help="sums without the weights and activations of a model")


def run(arguments: argparse.Namespace) -> int:
    """Runs the studies that are asked for; returns the exit status."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    of_sums, of_model = arguments.results / "numerics_sums.json", arguments.results / "numerics_language_model.json"
    if arguments.study in ("sums", "all"):
        study = study_sums(None if arguments.synthetic else arguments.model)
        of_sums.write_text(_by_lines(study))
        print(tables.of_sums(study))
    if arguments.study in ("model", "all"):
        print(tables.MODEL_HEADING)
        language_model.study(of_model, arguments.model, report=lambda run: print(tables.model_line(run), flush=True))
    if arguments.study in ("figures", "all"):
        arguments.figures.mkdir(parents=True, exist_ok=True)
        if of_sums.exists():
            study = json.loads(of_sums.read_text())
            print(tables.of_sums(study))
            figures.draw_sums(study, arguments.figures)
        if of_model.exists():
            runs = json.loads(of_model.read_text())["runs"]
            print(tables.of_model(runs))
            figures.draw_model(runs, arguments.figures)
        if not (of_sums.exists() or of_model.exists()):
            raise ValueError(f"--results: {arguments.results} has no results; run 'numerics sums' or 'numerics model'")
    return 0


def _by_lines(study: dict[str, list[Any]]) -> str:
    """JSON with a line for each record."""
    parts = []
    for name, records in study.items():
        lines = ",\n".join(map(json.dumps, records))
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def study_sums(model: str | None) -> dict[str, Any]:
    """Sums, dot products and attention: of sines and normal numbers, and of a model's where one is given."""
    vectors = {
        "sin, in order": sums.sines(),
        "sin, shuffled": sums.shuffled_sines(),
        "normal": np.random.default_rng(3).standard_normal(sums.LENGTH, np.float32),
    }
    pairs = {"normal": sums.normal_pairs()}
    if model is not None:
        of_model = language_model.LanguageModel(model)
        x, w = real_pairs(of_model)
        pairs["SmolLM2, MLP"] = (x, w)
        vectors["SmolLM2 weights"] = w.ravel()[: sums.LENGTH]
        vectors["SmolLM2 activations"] = x.ravel()[: sums.LENGTH]
        vectors["SmolLM2 products"] = (x * w).ravel()[: sums.LENGTH]
    return {"sums": sums.study_sums(vectors), "dots": sums.study_dots(pairs), "attention": sums.study_attention()}


def real_pairs(model: language_model.LanguageModel) -> tuple[Array, Array]:
    """What the down projections of all layers multiply: activations of a token, and the weights of an output channel.

    A layer has fewer than the longest dot product that is studied: layers follow each other.

    Returns:
      Two arrays `[PAIRS, longest]` float32.
    """
    layers = model.parameters.layers
    assert not isinstance(layers, tuple)
    inputs = np.stack([np.asarray(x) for name, x in model.activations() if name == "down"])  # [layers, tokens, in]
    weights = np.asarray(layers.down)  # [layers, in, out]
    generator = np.random.default_rng(4)
    tokens = generator.integers(0, inputs.shape[1], sums.PAIRS)
    channels = generator.integers(0, weights.shape[2], sums.PAIRS)
    longest = sums.DOT_LENGTHS[-1]
    x = inputs[:, tokens].transpose(1, 0, 2).reshape(sums.PAIRS, -1)[:, :longest]
    w = weights[:, :, channels].transpose(2, 0, 1).reshape(sums.PAIRS, -1)[:, :longest]
    return np.ascontiguousarray(x), np.ascontiguousarray(w)
