"""Quantizes the weights of a Hugging Face folder, and writes a folder that loads again, with the same results.

  palladion quantize path/to/Llama-3.2-1B Llama-3.2-1B-int4 --scheme=int4-g32
  palladion generate --model=Llama-3.2-1B-int4 --prompt="Once upon a time"

Weights are what `palladion generate --quantize=SCHEME` makes of them, bit for bit; the folder is smaller to keep, and
loads faster.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

from palladion.model.commands.progress import Progress
from palladion.model.quantized_folder import quantize_folder

HELP: Final = "writes a checkpoint with quantized weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("source", metavar="IN", help="a Hugging Face folder, or owner/name on the hub")
    parser.add_argument("target", metavar="OUT", help="the folder to write, which does not exist or is empty")
    parser.add_argument(
        "--scheme", required=True, help="int8, int4-g32, int4-g128-zeros, float8_e4m3fn, mxfp4, …: FORMAT[-gGROUP]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress("quantizing", "quantized") as progress:
        report = quantize_folder(arguments.source, arguments.target, arguments.scheme, progress.loading)
    print(
        f"{arguments.target}: {report.weights} weights in {arguments.scheme}, {report.dense} tensors as they were; "
        f"{report.bytes_before / 1e6:,.1f} MB became {report.bytes_after / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    return 0
