"""FlashInfer and FlashAttention, on a GPU, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.peers import Peer, first_reason, unsupported_dense, unsupported_paged
from palladion.benchmarks.measure.peers.torch_peers import TorchRunner, as_array, as_tensor, needs_torch
from palladion.kernels.decode_attention import Inputs
from palladion.kernels.decode_attention.cases import Case

WORKSPACE_BYTES: Final = 128 * 2**20
"""Size of the workspace that FlashInfer's documentation recommends."""


def _needs(package: str) -> Callable[[], str | None]:
    def unavailable() -> str | None:
        absent = f"{package} is not installed" if importlib.util.find_spec(package) is None else None
        return first_reason(needs_torch(gpu=True)(), absent)

    return unavailable


def _flash_attention(name: str, case: Case, inputs: Inputs) -> TorchRunner:
    library: Any = importlib.import_module("flash_attn")
    # [batch, heads, tokens, head_dim] -> [batch, tokens, heads, head_dim]
    k, v = (as_tensor(jnp.swapaxes(cache, 1, 2)) for cache in (inputs.k, inputs.v))
    scale = case.problem().scale

    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return library.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, softmax_scale=scale)

    operands = (as_tensor(inputs.q), k, v, as_tensor(inputs.lengths))
    return TorchRunner(name, attend, operands, lambda out: as_array(out, case.dtype))


def _flashinfer(name: str, case: Case, inputs: Inputs) -> TorchRunner:
    import torch

    page_size = case.page_size
    assert page_size is not None
    lengths, table = np.asarray(case.filled), np.asarray(inputs.page_table)
    counts = -(-lengths // page_size)
    # The pages of all sequences in one array, and where those of each sequence begin.
    indices = np.concatenate([table[b, :count] for b, count in enumerate(counts)]).astype(np.int32)
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = ((lengths - 1) % page_size + 1).astype(np.int32)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    library: Any = importlib.import_module("flashinfer")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=case.q_heads > case.kv_heads
    )
    dtype = getattr(torch, case.dtype)
    wrapper.plan(
        as_tensor(begins),
        as_tensor(indices),
        as_tensor(last),
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        page_size,
        q_data_type=dtype,
        kv_data_type=dtype,
        sm_scale=case.problem().scale,
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        return wrapper.run(q, (k, v))

    operands = (as_tensor(inputs.q[:, 0]), as_tensor(inputs.k), as_tensor(inputs.v))
    return TorchRunner(name, attend, operands, lambda out: as_array(out, case.dtype)[:, None])


PEERS: Final = (
    Peer("flash-attention", "decode_attention", _needs("flash_attn"), unsupported_dense, _flash_attention),
    Peer("flashinfer", "decode_attention", _needs("flashinfer"), unsupported_paged, _flashinfer),
)
