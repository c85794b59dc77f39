"""Semaphores of the TPU kernels: each is signalled only by the transfers that it is waited for.

Results do not show all of that: two arrays that are always waited for together may share a semaphore without harm,
until one of them is waited for alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
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
    """A DMA that a kernel has started.

    Attributes:
      array: id of the destination array.
      first_index: index on the first axis there, a buffer or a sequence; None for the whole array.
      semaphore: id of the semaphore that it signals.
    """

    array: int
    first_index: int | None
    semaphore: int


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Transfer]:
    """Returns a list that records the transfers of the kernels that a test runs, in order."""
    transfers: list[Transfer] = []
    start = interpret_pallas_call.dma_start
    signature = inspect.signature(start)

    @functools.wraps(start)
    def recorded(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        first = next((index for one in given["dst_transforms"] for index in one.indices), None)
        first_index = int(first) if isinstance(first, np.ndarray | jax.Array | int) else None
        transfers.append(Transfer(int(given["dst_id"]), first_index, int(given["dst_sem_id"])))
        return start(*arguments, **named)

    monkeypatch.setattr(interpret_pallas_call, "dma_start", recorded)
    return transfers


def run(operation: Any, case: Any, inputs: Any, config: Any) -> None:
    options = {**getattr(case, "options", {}), "backend": "mosaic_tpu", "config": config}
    call = functools.partial(operation, **options, interpret=tpu_interpreter.MODES["eager"])
    jax.block_until_ready(jax.jit(call, compiler_options=QUICKLY)(**inputs._asdict()))


def by_semaphore(transfers: list[Transfer], attribute: Callable[[Transfer], Hashable]) -> dict[int, set[Hashable]]:
    """Returns an attribute of the transfers that signal each semaphore."""
    attributes: dict[int, set[Hashable]] = collections.defaultdict(set)
    for transfer in transfers:
        attributes[transfer.semaphore].add(attribute(transfer))
    return attributes


def destination(transfer: Transfer) -> Hashable:
    return transfer.array, transfer.first_index


@pytest.mark.parametrize("name", ["window", "int8-window", "int8-paged-layers"])
def test_each_ring_of_attention_has_semaphores_for_each_buffer(name: str, started: list[Transfer]):
    case = next(case for case in attention_cases.TESTS if case.name == name)
    block_kv = 128 if case.page_size is None else 2 * case.page_size
    config = attention_kernel.Config(block_kv=block_kv, block_q=16, buffers=2)
    run(decode_attention, case, attention_cases.make_inputs(case), config)
    semaphores = by_semaphore(started, destination)
    assert all(len(destinations) == 1 for destinations in semaphores.values()), semaphores
    assert len(semaphores) == 2 * (4 if name.startswith("int8") else 2)  # each buffer of keys, values and their scales


@pytest.mark.parametrize("name", ["int4-minimums", "int4-zeros", "gated"])
def test_each_array_of_a_product_has_semaphores_for_each_buffer(name: str, started: list[Transfer]):
    case = next(case for case in product_cases.TESTS if case.name == name)
    config = product_kernel.Config(8, 128, 128, 64, "float8_e4m3b11fnuz")
    run(quantized_matmul, case, product_cases.make_inputs(case), config)
    semaphores = by_semaphore(started, destination)
    assert all(len(destinations) == 1 for destinations in semaphores.values()), semaphores
    rings = {transfer.array for transfer in started if transfer.first_index is not None}
    assert len(rings) >= 2  # codes and scales at least
    assert len(semaphores) == len({destination(transfer) for transfer in started})


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
    semaphores = by_semaphore(started, lambda transfer: kind[transfer.array])
    assert all(len(kinds) == 1 for kinds in semaphores.values()), semaphores
    assert len(semaphores) == 4
    by_block = by_semaphore(
        [transfer for transfer in started if kind[transfer.array] == "block"], lambda transfer: transfer.first_index
    )
    assert sorted(map(sorted, by_block.values())) == [[0], [1]]  # type: ignore[type-var]
