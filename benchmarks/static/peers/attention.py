"""Contests of decode attention: ours, JAX's own paged attentions, and those of tpu-inference and tokamax.

All compute attention of the newest token of each sequence; new keys and values are not written to the cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.static.peers.contests import OURS, Contender, Contest, traced_chip, with_target_device
from palladion.benchmarks.static.peers.packages import kernels_of
from palladion.kernels.decode_attention import decode_attention
from palladion.kernels.decode_attention.cases import Case
from palladion.reference.caches import QUANTIZED_CACHE_DTYPES

Workload = tuple[Callable[..., Any], tuple[Any, ...]]

VMEM_SHARE: Final = 0.75
"""Share of the chip's VMEM that is granted to kernels with a limit."""


def _lengths(case: Case) -> np.ndarray:
    return np.asarray(case.filled, np.int32)


def _pages(case: Case) -> np.ndarray:
    """Returns the page table `[batch, pages_per_seq]`, with shuffled pages."""
    assert case.page_size is not None
    count = case.max_len // case.page_size
    order = np.random.default_rng(0).permutation(case.batch * count)
    return order.astype(np.int32).reshape(case.batch, count)


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _is_paged(case: Case) -> bool:
    return case.page_size is not None


def _ours(case: Case, setting: str) -> Workload:
    if setting == "dense":
        case = dataclasses.replace(case, page_size=None)
    inputs = case.shapes()._replace(lengths=_lengths(case))  # type: ignore[arg-type]  # values that are followed
    if case.page_size is not None:
        inputs = inputs._replace(page_table=_pages(case))  # type: ignore[arg-type]
    return lambda given: decode_attention(**given._asdict(), backend="mosaic_tpu"), (inputs,)


def _paged_attention_settings(case: Case) -> tuple[str, ...]:
    if not _is_paged(case) or case.kv_dtype not in (None, "int8"):
        return ()
    blocks = sorted({min(tokens, case.max_len) for tokens in (512, 2048)})
    return tuple(f"{tokens // case.page_size} pages a block" for tokens in blocks)  # type: ignore[operator]


def _paged_attention(case: Case, setting: str) -> Workload:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils

    table = _pages(case)
    pages = (case.kv_heads, table.size, case.page_size, case.head_dim)
    cache: Any = _array(pages, case.kv_dtype or case.dtype)  # type: ignore[arg-type]
    if case.kv_dtype == "int8":
        quantized = quantization_utils.QuantizedTensor
        cache = quantized(cache, _array((*pages[:-1], 1), "float32"))  # type: ignore[arg-type]

    def function(q: Any, k: Any, v: Any, lengths: Any, page_table: Any) -> Any:
        return paged_attention(
            q,
            k,
            v,
            lengths,
            page_table,
            pages_per_compute_block=int(setting.split()[0]),
            megacore_mode="kv_head" if traced_chip().cores > 1 else None,
        )

    return with_target_device(function), (_queries(case), cache, cache, _lengths(case), table)


def _queries(case: Case) -> jax.ShapeDtypeStruct:
    return _array((case.batch, case.q_heads, case.head_dim), case.dtype)


def _ragged_settings(case: Case) -> tuple[str, ...]:
    return ("its own blocks", "512 tokens a block", "2048 tokens a block") if _is_paged(case) else ()


def _ragged(case: Case, setting: str) -> Workload:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    assert case.page_size is not None
    table = _pages(case)
    blocks: dict[str, int] = {}
    if setting != "its own blocks":
        tokens = min(int(setting.split()[0]), case.max_len)
        blocks = {"num_kv_pages_per_block": tokens // case.page_size, "num_queries_per_block": min(8, case.batch)}
    scales = {} if case.kv_dtype is None else {"k_scale": 0.5, "v_scale": 0.5}

    def function(*arrays: Any) -> Any:
        limit = int(traced_chip().vmem_bytes * VMEM_SHARE)
        return ragged_paged_attention(*arrays, sm_scale=case.head_dim**-0.5, vmem_limit_bytes=limit, **blocks, **scales)

    cache = _array((table.size, case.page_size, 2 * case.kv_heads, case.head_dim), case.kv_dtype or case.dtype)
    first = np.arange(case.batch + 1, dtype=np.int32)
    count = np.array([case.batch], np.int32)
    return with_target_device(function), (_queries(case), cache, _lengths(case), table, first, count)


def _fused_arguments(case: Case) -> tuple[Any, ...]:
    """Returns the arguments of ragged paged attention v3 and its successors.

    Keys and values alternate in the cache, packed in 32-bit words.
    """
    assert case.page_size is not None
    dtype = case.kv_dtype or case.dtype
    packing = 4 // jnp.dtype(dtype).itemsize
    table = _pages(case)
    new = _array((case.batch, case.kv_heads, case.head_dim), dtype)
    pages = (table.size, case.page_size, 2 * case.kv_heads // packing, packing, case.head_dim)
    first = np.arange(case.batch + 1, dtype=np.int32)
    only_decoding = np.full(3, case.batch, np.int32)
    return _queries(case), new, new, _array(pages, dtype), _lengths(case), table.reshape(-1), first, only_decoding


def _fused_options(case: Case) -> dict[str, Any]:
    scales = {} if case.kv_dtype is None else {"k_scale": 0.5, "v_scale": 0.5}
    return {"sm_scale": case.head_dim**-0.5, "update_kv_cache": False, **scales}


def _ragged_3_settings(case: Case) -> tuple[str, ...]:
    return ("its own blocks", "1024 tokens a block") if _is_paged(case) and case.kv_dtype != "int8" else ()


def _ragged_3(case: Case, setting: str) -> Workload:
    module = kernels_of("tpu-inference", "kernels.ragged_paged_attention.v3.kernel")
    blocks = {} if setting == "its own blocks" else {"d_block_sizes": (1, 1024, 1, 1024)}

    def function(*arrays: Any) -> Any:
        return module.ragged_paged_attention(*arrays, **_fused_options(case), **blocks)

    return with_target_device(function), _fused_arguments(case)


def _batched_settings(case: Case) -> tuple[str, ...]:
    return ("its own blocks",) if _is_paged(case) and case.kv_dtype != "int8" else ()


def _batched(case: Case, _: str) -> Workload:
    folder = "kernels.experimental.batched_rpa"
    module = kernels_of("tpu-inference", f"{folder}.wrapper")
    layout = kernels_of("tpu-inference", f"{folder}.configs").KVLayout.HEAD_ALONG_SUBLANE

    def function(*arrays: Any) -> Any:
        return module.ragged_paged_attention(*arrays, kv_layout=layout, **_fused_options(case))

    return with_target_device(function), _fused_arguments(case)


def _tokamax_batched(case: Case, _: str) -> Workload:
    folder = "_src.ops.batched_rpa.kernel"
    module, configs = (kernels_of("tokamax", f"{folder}.{name}") for name in ("wrapper", "configs"))
    # The block sizes of its operation without autotuning.
    decode = configs.BlockSizes(bq_sz=1, bq_c_sz=1, bkv_sz=512, batch_size=8, n_buffer=3)
    prefill = configs.BlockSizes(bq_sz=128, bq_c_sz=64, bkv_sz=512, batch_size=2, n_buffer=3)

    def function(*arrays: Any) -> Any:
        return module.ragged_paged_attention(
            *arrays,
            decode_block_sizes=decode,
            prefill_block_sizes=prefill,
            kv_layout=configs.KVLayout.HEAD_ALONG_SUBLANE,
            **_fused_options(case),
        )

    return with_target_device(function), _fused_arguments(case)


CONTENDERS: Final = (
    Contender(OURS, "palladion", lambda case: ("paged", "dense") if _is_paged(case) else ("dense",), _ours),
    Contender("jax paged_attention", "jax", _paged_attention_settings, _paged_attention),
    Contender("jax ragged_paged_attention", "jax", _ragged_settings, _ragged),
    Contender("tpu-inference ragged_paged_attention v3", "tpu-inference", _ragged_3_settings, _ragged_3),
    Contender("tpu-inference batched_rpa", "tpu-inference", _batched_settings, _batched),
    Contender("tokamax batched_rpa", "tokamax", _batched_settings, _tokamax_batched),
)


def _contests() -> Iterator[Contest]:
    """Yields Llama-3-8B's decode attention from latency to capacity, and a model with twice the query heads."""
    sizes = ((8, 4096, 32), (1, 4096, 32), (64, 1024, 32), (8, 4096, 64))
    pages_and_dtypes = ((64, None), (16, None), *((64, dtype) for dtype in QUANTIZED_CACHE_DTYPES[:2]))
    for (batch, max_len, q_heads), (page_size, kv_dtype) in itertools.product(sizes, pages_and_dtypes):
        case = Case(
            name=f"{batch}x{max_len}-{q_heads}x8x128-{kv_dtype or 'bfloat16'}-pages-of-{page_size}",
            batch=batch,
            q_heads=q_heads,
            kv_heads=8,
            head_dim=128,
            max_len=max_len,
            page_size=page_size,
            kv_dtype=kv_dtype,
        )
        yield Contest("decode_attention", case, CONTENDERS)


CONTESTS: Final = tuple(_contests())
