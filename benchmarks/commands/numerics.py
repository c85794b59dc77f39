r"""Measures what each bit costs, from the sum of a vector to a language model.

  python -m palladion.benchmarks numerics sums        sums, dot products and attention in few bits; a minute
  python -m palladion.benchmarks numerics model       SmolLM2 under every scheme; continues where it was interrupted
  python -m palladion.benchmarks numerics figures     tables and pictures from the results of both

Results are JSON files in --results; pictures go to --figures. docs/numerics.md draws the conclusions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from palladion.benchmarks.numerics import figures, language_model, studies, tables

HELP: Final = "measures what each bit costs, in sums, dot products, attention and a language model"

STUDIES: Final = ("sums", "model", "figures", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("study", choices=STUDIES, help="what to study")
    parser.add_argument("--model", default="smollm2", help="a checkpoint; 'smollm2' is packaged")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    parser.add_argument("--synthetic", action="store_true", help="sums without the weights and activations of a model")


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen studies."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    sums_file, model_file = (arguments.results / f"numerics_{name}.json" for name in ("sums", "language_model"))
    if arguments.study in ("sums", "all"):
        study = studies.study_sums(None if arguments.synthetic else arguments.model)
        sums_file.write_text(_by_lines(study))
        print(tables.sums_tables(study))
    if arguments.study in ("model", "all"):
        print(tables.MODEL_HEADING)
        language_model.study(model_file, arguments.model, report=lambda run: print(tables.model_line(run), flush=True))
    if arguments.study in ("figures", "all"):
        arguments.figures.mkdir(parents=True, exist_ok=True)
        if sums_file.exists():
            study = json.loads(sums_file.read_text())
            print(tables.sums_tables(study))
            figures.draw_sums(study, arguments.figures)
        if model_file.exists():
            runs = json.loads(model_file.read_text())["runs"]
            print(tables.model_tables(runs))
            figures.draw_model(runs, arguments.figures)
        if not (sums_file.exists() or model_file.exists()):
            raise ValueError(f"--results: {arguments.results} has no results; run 'numerics sums' or 'numerics model'")
    return 0


def _by_lines(study: dict[str, list[Any]]) -> str:
    """Formats a study as JSON with a line for each record."""
    parts = []
    for name, records in study.items():
        lines = ",\n".join(map(json.dumps, records))
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"
