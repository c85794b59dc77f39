"""Peers that come with JAX: dot_product_attention, its Pallas operations, and a dense product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from palladion.benchmarks.measure.peers import (
    Peer,
    first_reason,
    unsupported_dense,
    unsupported_paged,
    zero_dead_tokens,
)
from palladion.benchmarks.measure.timing import JaxRunner
from palladion.kernels.decode_attention import Inputs as AttentionInputs
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.reference import dequantize
from palladion.reference.platforms import target_platform

MOST_SPLITS: Final = 16
"""The default number of splits of the cache in JAX's own kernels."""

MOST_PAGES: Final = 8
"""Pages in a compute block, at most."""


def _needs_gpu() -> str | None:
    return None if target_platform() == "gpu" else "runs on a GPU only"


def _ragged(case: AttentionCase, inputs: AttentionInputs) -> jax.Array | None:
    """Returns the lengths; None where every sequence fills the cache."""
    return None if min(case.filled) == case.max_len else inputs.lengths


def _jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable[[str, AttentionCase, AttentionInputs], JaxRunner]:
    def make(name: str, case: AttentionCase, inputs: AttentionInputs) -> JaxRunner:
        # [batch, heads, tokens, head_dim] -> [batch, tokens, heads, head_dim]
        k, v = (jnp.swapaxes(zero_dead_tokens(cache, inputs.lengths), 1, 2) for cache in (inputs.k, inputs.v))

        def attend(operands: Any) -> jax.Array:
            q, k, v, lengths = operands
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                scale=case.problem().scale,
                key_value_seq_lengths=lengths,
                query_seq_lengths=None if lengths is None else jnp.ones_like(lengths),
                implementation=implementation,
            )

        return JaxRunner.compile(name, attend, (inputs.q, k, v, _ragged(case, inputs)))

    return make


def _pallas_decode(name: str, case: AttentionCase, inputs: AttentionInputs) -> JaxRunner:
    from jax.experimental.pallas.ops.gpu import decode_attention as library

    def attend(operands: Any) -> jax.Array:
        q, k, v, lengths = operands
        # It takes [batch, tokens, heads, head_dim] and transposes it: XLA cancels one transposition by the other.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        return library.gqa(q[:, 0], k, v, kv_seq_len=lengths, sm_scale=case.problem().scale)[:, None]

    runner = JaxRunner.compile(name, attend, (inputs.q, inputs.k, inputs.v, _ragged(case, inputs)))
    runner.result = runner.result.astype(case.dtype)  # it returns float32
    return runner


def _pallas_paged(name: str, case: AttentionCase, inputs: AttentionInputs) -> JaxRunner:
    from jax.experimental.pallas.ops.gpu import paged_attention as library

    assert inputs.page_table is not None
    pages = inputs.page_table.shape[1]
    splits = next(n for n in range(MOST_SPLITS, 0, -1) if pages % n == 0)
    block = next(n for n in range(MOST_PAGES, 0, -1) if pages // splits % n == 0)
    num_pages = inputs.k.shape[0]
    # It takes KV heads first, and reads dead pages, which hold NaN here.
    k, v = (jnp.nan_to_num(jnp.swapaxes(cache, 0, 1)) for cache in (inputs.k, inputs.v))
    table = jnp.minimum(inputs.page_table, num_pages - 1)

    def attend(operands: Any) -> jax.Array:
        q, k, v, table, lengths = operands
        scaled = (q[:, 0].astype(jnp.float32) * case.problem().scale).astype(q.dtype)
        out = library.paged_attention(scaled, k, v, table, lengths, k_splits=splits, pages_per_compute_block=block)
        return out[:, None]

    return JaxRunner.compile(name, attend, (inputs.q, k, v, table, inputs.lengths))


def _dense_product(name: str, case: MatmulCase, inputs: Any) -> JaxRunner:
    dtype = jnp.dtype(case.dtype)
    transposed = target_platform() == "gpu"  # cuBLAS reads [out, in] faster
    dense = dequantize(inputs.w, dtype)

    def multiply(operands: Any) -> jax.Array:
        x, w = operands
        y = jnp.dot(x, w.T if transposed else w, preferred_element_type=jnp.float32)
        if case.gated:
            gate, up = jnp.split(y, 2, axis=1)
            y = (gate if case.activation is None else case.activation(gate)) * up
        elif case.activation is not None:
            y = case.activation(y)
        return y.astype(case.out_dtype or dtype)

    return JaxRunner.compile(name, multiply, (inputs.x, jnp.array(dense.T) if transposed else dense))


def _unsupported_product(case: MatmulCase) -> str | None:
    return first_reason(
        "a stack of layers" if case.num_layers is not None else None,
        "a bias" if case.bias else None,
        "quantized activations" if case.quantize_x is not None else None,
    )


def _unsupported_cudnn(case: AttentionCase) -> str | None:
    return first_reason("float32" if case.dtype == "float32" else None, unsupported_dense(case))


PEERS: Final = (
    Peer("jax-nn-xla", "decode_attention", lambda: None, unsupported_dense, _jax_nn("xla")),
    Peer("jax-nn-cudnn", "decode_attention", _needs_gpu, _unsupported_cudnn, _jax_nn("cudnn")),
    Peer("jax-pallas-decode", "decode_attention", _needs_gpu, unsupported_dense, _pallas_decode),
    Peer("jax-pallas-paged", "decode_attention", _needs_gpu, unsupported_paged, _pallas_paged),
    Peer("dense-dot", "quantized_matmul", lambda: None, _unsupported_product, _dense_product),
)
"""JAX's own implementations.

"dense-dot" reads dense weights in the dtype of x, which quantized weights have to beat; on a GPU it is cuBLAS.
"""
