"""FlashInfer, FlashAttention and GemLite, on a GPU, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.peers import Peer, first_reason, unsupported_attention, unsupported_dense
from palladion.benchmarks.measure.peers.torch_peers import (
    TorchRunner,
    as_array,
    as_tensor,
    finish_of,
    in_groups,
    needs_torch,
    only,
)
from palladion.kernels.decode_attention import Inputs
from palladion.kernels.decode_attention.cases import Case
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.reference.quantization import unpack_codes
from palladion.reference.scheme import INT4_ZERO

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

    page_size = case.page_size or case.max_len  # a dense cache is one page for each sequence
    lengths = np.asarray(case.filled)
    table = np.arange(case.batch)[:, None] if inputs.page_table is None else np.asarray(inputs.page_table)
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


def _gemlite(name: str, case: MatmulCase, inputs: Any) -> TorchRunner:
    import torch

    library: Any = importlib.import_module("gemlite.core")
    finish, w, packed = finish_of(case), inputs.w.with_order("out_in"), inputs.w.scheme.packed
    codes = as_tensor(np.asarray(unpack_codes(w)).T.astype(np.uint8 if packed else np.int8)).contiguous()  # [out, in]
    linear = library.GemLiteLinearTriton(
        W_nbits=4 if packed else 8,
        group_size=w.scheme.group_size or case.in_features,
        in_features=case.in_features,
        out_features=case.out_features,
        input_dtype=library.DType.BF16,
        output_dtype=library.DType.BF16,
    )
    linear.pack(codes, as_tensor(w.scales).to(torch.bfloat16), zeros=INT4_ZERO if packed else None)
    options = linear.get_meta_args()

    def multiply(x: Any, *weights: Any) -> Any:
        return finish(library.forward_functional(x, None, list(weights), options))

    operands = (as_tensor(inputs.x), *linear.get_tensor_args())
    return TorchRunner(name, multiply, operands, lambda out: as_array(out, case.dtype))


def _int8_or_groups(scheme: str) -> bool:
    return scheme == "int8" or in_groups(scheme)


PEERS: Final = (
    Peer("flash-attention", "decode_attention", _needs("flash_attn"), unsupported_dense, _flash_attention),
    Peer("flashinfer", "decode_attention", _needs("flashinfer"), unsupported_attention, _flashinfer),
    Peer(
        "gemlite",
        "quantized_matmul",
        _needs("gemlite"),
        only(_int8_or_groups, "int8 per channel and int4 in groups, symmetric"),
        _gemlite,
        slow=True,
    ),
)
