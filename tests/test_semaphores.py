"""Semaphores of the TPU kernels: each is signalled only by the transfers that it is waited for.

Results do not show all of that: two arrays that are always waited for together may share a semaphore without harm,
until one of them is waited for alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tpu_interpreter
from compiling import QUICKLY
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from palladion import append_kv, decode_attention, quantized_matmul
from palladion.kernels.append_kv import cases as append_cases
from palladion.kernels.append_kv.mosaic_tpu import call as append_kernel
from palladion.kernels.decode_attention import cases as attention_cases
from palladion.kernels.decode_attention.mosaic_tpu import call as attention_kernel
from palladion.kernels.quantized_matmul import cases as product_cases
from palladion.kernels.quantized_matmul.mosaic_tpu import call as product_kernel


class Transfer(NamedTuple):
    """A transfer that a kernel has started.

    Attributes:
      array: where it goes.
      place: the first index there, a buffer or a sequence; None for all of the array.
      semaphore: which it signals.
    """

    array: int
    place: int | None
    semaphore: int


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Transfer]:
    """Every transfer of the kernels that a test runs, in their order."""
    found: list[Transfer] = []
    start = interpret_pallas_call.dma_start
    signature = inspect.signature(start)

    @functools.wraps(start)
    def noted(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        first = next((index for one in given["dst_transforms"] for index in one.indices), None)
        place = int(first) if isinstance(first, np.ndarray | jax.Array | int) else None
        found.append(Transfer(int(given["dst_id"]), place, int(given["dst_sem_id"])))
        return start(*arguments, **named)

    monkeypatch.setattr(interpret_pallas_call, "dma_start", noted)
    return found


def run(operation: Any, case: Any, inputs: Any, config: Any) -> None:
    options = {**getattr(case, "options", {}), "backend": "mosaic_tpu", "config": config}
    call = functools.partial(operation, **options, interpret=tpu_interpreter.MODES["eager"])
    jax.block_until_ready(jax.jit(call, compiler_options=QUICKLY)(**inputs._asdict()))


def signalled_by(transfers: list[Transfer], what: Any) -> dict[int, set[Hashable]]:
    """For each semaphore, what of the transfers that signal it."""
    found: dict[int, set[Hashable]] = collections.defaultdict(set)
    for transfer in transfers:
        found[transfer.semaphore].add(what(transfer))
    return found


def array_and_place(transfer: Transfer) -> Hashable:
    return transfer.array, transfer.place


@pytest.mark.parametrize("name", ["window", "int8-window", "int8-paged-layers"])
def test_each_ring_of_attention_has_semaphores_for_each_buffer(name: str, started: list[Transfer]):
    case = next(case for case in attention_cases.TESTS if case.name == name)
    block_kv = 128 if case.page_size is None else 2 * case.page_size
    config = attention_kernel.Config(block_kv=block_kv, block_q=16, buffers=2)
    run(decode_attention, case, attention_cases.make_inputs(case), config)
    semaphores = signalled_by(started, array_and_place)
    assert all(len(places) == 1 for places in semaphores.values()), semaphores
    assert len(semaphores) == 2 * (4 if name.startswith("int8") else 2)  # each buffer of keys, values and their scales


@pytest.mark.parametrize("name", ["int4-minimums", "int4-zeros", "gated"])
def test_each_array_of_a_product_has_semaphores_for_each_buffer(name: str, started: list[Transfer]):
    case = next(case for case in product_cases.TESTS if case.name == name)
    config = product_kernel.Config(8, 128, 128, 64, "float8_e4m3b11fnuz")
    run(quantized_matmul, case, product_cases.make_inputs(case), config)
    semaphores = signalled_by(started, array_and_place)
    assert all(len(places) == 1 for places in semaphores.values()), semaphores
    rings = {transfer.array for transfer in started if transfer.place is not None}
    assert len(rings) >= 2  # codes and scales at least
    places = {array_and_place(transfer) for transfer in started}
    assert len(semaphores) == len(places)


@pytest.mark.parametrize("name", ["int8", "verify", "paged"])
def test_append_has_semaphores_for_new_tokens_for_each_sequence_and_for_writes(name: str, started: list[Transfer]):
    case = next(case for case in append_cases.TESTS if case.name == name)
    config = dataclasses.replace(append_kernel.heuristic(case.problem()), sequences=2)
    inputs = append_cases.make_inputs(case)
    run(append_kv, case, inputs, config)
    arrays = sorted({transfer.array for transfer in started})
    # In the order of the kernel's arguments: the cache (an output), new tokens, blocks.
    per_kind = 4 if inputs.cache.k_scale is not None else 2
    assert len(arrays) == 3 * per_kind
    kind = {array: ("cache", "new tokens", "block")[number // per_kind] for number, array in enumerate(arrays)}
    semaphores = signalled_by(started, lambda transfer: kind[transfer.array])
    assert all(len(kinds) == 1 for kinds in semaphores.values()), semaphores
    assert len(semaphores) == 4
    by_block = signalled_by(
        [transfer for transfer in started if kind[transfer.array] == "block"], lambda transfer: transfer.place
    )
    assert sorted(map(sorted, by_block.values())) == [[0], [1]]  # type: ignore[type-var]
