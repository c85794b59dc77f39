"""FlashInfer and FlashAttention, on a GPU, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.peers import Contender, Peer, first, plain_attention
from palladion.benchmarks.measure.peers.torch_peers import TorchRunner, as_array, as_tensor, dense_only, needs_torch

WORKSPACE_BYTES: Final = 128 * 2**20
"""What FlashInfer asks for."""


def _needs(package: str) -> Any:
    def missing() -> str | None:
        absent = f"{package} is not installed" if importlib.util.find_spec(package) is None else None
        return first(needs_torch(gpu=True)(), absent)

    return missing


def _flash_attention(name: str, case: Any, inputs: Any) -> Contender:
    library: Any = importlib.import_module("flash_attn")
    # [batch, heads, tokens, head_dim] -> [batch, tokens, heads, head_dim]
    k, v = (as_tensor(jnp.swapaxes(part, 1, 2)) for part in (inputs.k, inputs.v))
    scale = case.problem().scale

    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return library.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, softmax_scale=scale)

    runner = TorchRunner(name, attend, (as_tensor(inputs.q), k, v, as_tensor(inputs.lengths)))
    return Contender(runner, as_array(runner.result, case.dtype))


def _pages(case: Any) -> str | None:
    return first("a dense cache" if case.page_size is None else None, plain_attention(case))


def _flashinfer(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    lengths, page = np.asarray(case.filled), case.page_size
    counts = -(-lengths // page)
    table = np.asarray(inputs.page_table)
    # Pages of all sequences behind each other, and where those of each begin.
    indices = np.concatenate([table[b, :count] for b, count in enumerate(counts)]).astype(np.int32)
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = ((lengths - 1) % page + 1).astype(np.int32)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    library: Any = importlib.import_module("flashinfer")
    plan = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=case.q_heads > case.kv_heads)
    dtype = getattr(torch, case.dtype)
    plan.plan(
        as_tensor(begins),
        as_tensor(indices),
        as_tensor(last),
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        page,
        q_data_type=dtype,
        kv_data_type=dtype,
        sm_scale=case.problem().scale,
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        return plan.run(q, (k, v))

    runner = TorchRunner(name, attend, (as_tensor(inputs.q[:, 0]), as_tensor(inputs.k), as_tensor(inputs.v)))
    return Contender(runner, as_array(runner.result, case.dtype)[:, None])


PEERS: Final = (
    Peer("flash-attention", "decode_attention", _needs("flash_attn"), dense_only, _flash_attention),
    Peer("flashinfer", "decode_attention", _needs("flashinfer"), _pages, _flashinfer),
)
