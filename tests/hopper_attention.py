"""Small cases of decode_attention's Mosaic GPU kernels, interpreted and held against the oracle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from compiling import QUICKLY, options_for

from palladion import decode_attention
from palladion.kernels.decode_attention import Inputs, cases
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.decode_attention.mosaic_gpu import call
from palladion.kernels.decode_attention.mosaic_gpu.call import Config
from palladion.reference import oracle
from palladion.reference.compare import assert_right


def case_of(name: str = "case", **changes: Any) -> Case:
    base = Case(name=name, batch=2, q_heads=4, kv_heads=2, head_dim=64, max_len=192, lengths=(130, 64))
    return dataclasses.replace(base, **changes)


def run(case: Case, config: Config, inputs: Inputs, interpret: Any = True) -> tuple[jax.Array, jax.Array]:
    function = functools.partial(call.decode_attention, case.problem(), config=config, interpret=interpret)
    return jax.jit(function, compiler_options=QUICKLY)(inputs)


def check(case: Case, config: Config, inputs: Inputs | None = None, interpret: Any = True) -> None:
    inputs = cases.make_inputs(case) if inputs is None else inputs
    refer = functools.partial(decode_attention, **case.options, return_lse=True, backend="xla")
    reference = jax.jit(lambda inputs: refer(**inputs._asdict()), compiler_options=options_for("xla"))(inputs)
    arrays = inputs._asdict()
    layer = arrays.pop("layer")
    for part in () if layer is None else ("k", "v", "k_scale", "v_scale"):
        arrays[part] = None if arrays[part] is None else arrays[part][int(layer)]
    exact = oracle.decode_attention(**arrays, **case.options)
    found = run(case, config, inputs, interpret)
    for name, *values in zip(("out", "lse"), found, reference, exact, strict=True):
        assert_right(*values, what=f"{case.name}: {name}")
