"""Options that several commands share: lists, and the workloads of an operation by name, by model or by hand."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from palladion.benchmarks.measure.model_shapes import models
from palladion.benchmarks.measure.operations import Operation
from palladion.kernels.checks import check

DEFAULT_MODEL: Final = "llama3-8b"

SHORT: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "f8e4", "float8_e5m2": "f8e5"}
"""Abbreviations of dtypes in names of workloads."""


def numbers(text: str) -> tuple[int, ...]:
    """Parses integers separated by commas."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Parses words separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose workloads."""
    which = parser.add_argument_group("which workloads: of a model, by name, or by hand")
    which.add_argument("--model", type=names, metavar="NAMES", help=f"shapes of models ({DEFAULT_MODEL} by default)")
    which.add_argument("--cases", type=names, metavar="NAMES", help="the operation's named cases, or patterns of names")
    which.add_argument("--batch", type=numbers, default=(1,), metavar="N,…", help="sequences (1)")
    which.add_argument("--q-len", type=int, default=1, metavar="N", help="new tokens of each sequence (1)")
    which.add_argument("--kv-len", type=numbers, default=(4096,), metavar="N,…", help="tokens in each cache (4096)")
    which.add_argument("--ragged", action="store_true", help="spread the lengths of sequences evenly up to kv-len")
    which.add_argument("--page-size", type=int, metavar="N", help="a paged cache instead of a dense one")
    which.add_argument("--kv-dtype", type=names, default=("",), metavar="NAMES", help="of the cache (that of --dtype)")
    which.add_argument("--dtype", default="bfloat16", help="of queries and activations (bfloat16)")
    for name in ("q-heads", "kv-heads", "head-dim"):
        which.add_argument(f"--{name}", type=int, metavar="N", help="by hand instead of a model's")
    which.add_argument("--rows", type=numbers, metavar="N,…", help="of activations (that of --batch)")
    which.add_argument("--in", dest="in_features", type=int, metavar="N", help="by hand instead of a model's layers")
    which.add_argument("--out", dest="out_features", type=int, metavar="N", help="by hand instead of a model's layers")
    which.add_argument("--scheme", type=names, default=("int8",), metavar="NAMES", help="of weights (int8)")
    which.add_argument("--norm", action="store_true", help="with an RMS norm of activations before products")
    which.add_argument("--layers", type=names, metavar="NAMES", help="of qkv, output, gate-up, down, head: only these")


CASES_OF: Final[dict[str, str]] = {
    "decode_attention": "attention_cases",
    "append_kv": "append_cases",
    "append_qkv": "append_qkv_cases",
}
"""Methods of `ModelShape` that return the cases of an operation on a cache."""


def selected(operation: Operation, arguments: argparse.Namespace) -> list[Any]:
    """Returns the chosen cases, each with a name of its own.

    Raises:
      ValueError: a name is not known; the message lists those that are.
    """
    for name in arguments.model or ():
        check(name in models(), "--model", name, ", ".join(models()))
    if arguments.cases:
        return list(_named(operation, arguments.cases))
    if operation.name in ("quantized_matmul", "matmul"):
        return list(_products(operation, arguments))
    if operation.name in CASES_OF:
        return list(_caches(operation, arguments))
    return list(operation.cases.MODELS)


def _named(operation: Operation, patterns: Sequence[str]) -> Iterator[Any]:
    """Yields the cases whose names match the patterns."""
    known = operation.named_cases()
    for pattern in patterns:
        meant = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        check(bool(meant), "--cases", pattern, f"patterns, or {', '.join(known)}")
        yield from (known[name] for name in meant)


def _caches(operation: Operation, arguments: argparse.Namespace) -> Iterator[Any]:
    """Yields cases of decode_attention, append_kv or append_qkv."""
    heads = {"q_heads": arguments.q_heads, "kv_heads": arguments.kv_heads, "head_dim": arguments.head_dim}
    if operation.name == "append_kv":
        del heads["q_heads"]
    given = [name for name, value in heads.items() if value is not None]
    check(len(given) in (0, len(heads)), "heads by hand", ", ".join(given), f"all of {', '.join(heads)}")
    shapes = [models()[name] for name in arguments.model or (DEFAULT_MODEL,)]
    for kv_dtype, batch, kv_len in itertools.product(arguments.kv_dtype, arguments.batch, arguments.kv_len):
        sizes = {"batch": batch, "max_len": kv_len, "q_len": arguments.q_len, "page_size": arguments.page_size}
        sizes |= {"dtype": arguments.dtype, "kv_dtype": kv_dtype or None}
        if arguments.ragged:
            sizes["lengths"] = ragged(batch, kv_len, arguments.q_len)
        if given:
            cases = [operation.cases.Case(name="by-hand", **heads, **sizes)]
        else:
            cases = [case for shape in shapes for case in getattr(shape, CASES_OF[operation.name])(**sizes)]
        for case in cases:
            yield dataclasses.replace(case, name=_cache_name(case, ragged=arguments.ragged))


def ragged(batch: int, kv_len: int, q_len: int = 1) -> tuple[int, ...]:
    """Returns evenly spread lengths, the longest kv_len."""
    return tuple(max(q_len, kv_len * (i + 1) // batch) for i in range(batch))


def _cache_name(case: Any, *, ragged: bool) -> str:
    parts = [
        case.name,
        f"b{case.batch}",
        f"q{case.q_len}" if case.q_len > 1 else "",
        f"{case.max_len}{'r' if ragged else ''}",
        f"p{case.page_size}" if case.page_size else "",
        SHORT.get(case.kv_dtype or case.dtype, case.kv_dtype or case.dtype),
    ]
    return "-".join(part for part in parts if part)


def _products(operation: Operation, arguments: argparse.Namespace) -> Iterator[Any]:
    """Yields cases of quantized_matmul, or of matmul, which has no schemes, by number of rows."""
    dense = operation.name == "matmul"
    by_hand = arguments.in_features, arguments.out_features
    check(by_hand.count(None) != 1, "sizes by hand", by_hand, "both of --in and --out")
    known = list(models()[DEFAULT_MODEL].linears())
    for name in arguments.layers or ():
        check(name in known, "--layers", name, ", ".join(known))
    shapes = [models()[name] for name in arguments.model or (DEFAULT_MODEL,)]
    schemes = ("",) if dense else arguments.scheme
    for rows, scheme in itertools.product(arguments.rows or arguments.batch, schemes):
        dtypes = {"dtype": arguments.dtype} if dense else {"scheme": scheme, "dtype": arguments.dtype}
        if by_hand[0] is not None:
            sizes = {"in_features": by_hand[0], "out_features": by_hand[1], "rows": rows}
            cases = [operation.cases.Case(name=f"{by_hand[0]}x{by_hand[1]}", **sizes, **dtypes)]
        else:
            method = "dense_cases" if dense else "matmul_cases"
            layers = arguments.layers or known
            cases = [case for shape in shapes for case in getattr(shape, method)(rows, **dtypes)]
            cases = [case for case in cases if any(case.name.endswith(f"-{name}") for name in layers)]
        for case in cases:
            norm = "norm" if arguments.norm else ""
            parts = (case.name, f"m{rows}", scheme, norm, SHORT.get(case.dtype, case.dtype))
            yield dataclasses.replace(case, name="-".join(filter(None, parts)), norm=arguments.norm)
