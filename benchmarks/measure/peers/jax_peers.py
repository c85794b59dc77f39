"""What JAX itself offers: dot_product_attention, the Pallas operations that come with it, and a dense product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from palladion.benchmarks.measure.peers import Contender, Peer, first, plain_attention, seen
from palladion.benchmarks.measure.timing import JaxRunner
from palladion.reference import dequantize
from palladion.reference.platforms import target_platform

PALLAS_SPLITS: Final = 16
"""What jax's own kernels cut the cache into by default."""

PAGES_AT_A_TIME: Final = 8


def _contender(
    name: str, function: Callable[[Any], jax.Array], inputs: Any, shown: Callable[[jax.Array], Any] = lambda x: x
) -> Contender:
    runner = JaxRunner.of(name, function, inputs)
    return Contender(runner, shown(runner.result))


def _needs_gpu() -> str | None:
    return None if target_platform() == "gpu" else "runs on a GPU only"


def _dense(case: Any) -> str | None:
    return first("pages" if case.page_size is not None else None, plain_attention(case))


def _ragged(case: Any, inputs: Any) -> jax.Array | None:
    """Lengths, where they are not all the whole cache."""
    return None if min(case.filled) == case.max_len else inputs.lengths


def _jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable[[str, Any, Any], Contender]:
    def make(name: str, case: Any, inputs: Any) -> Contender:
        # [batch, heads, tokens, head_dim] -> [batch, tokens, heads, head_dim]
        k, v = (jnp.swapaxes(seen(part, inputs.lengths), 1, 2) for part in (inputs.k, inputs.v))

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

        return _contender(name, attend, (inputs.q, k, v, _ragged(case, inputs)))

    return make


def _pallas_decode(name: str, case: Any, inputs: Any) -> Contender:
    from jax.experimental.pallas.ops.gpu import decode_attention as library

    def attend(operands: Any) -> jax.Array:
        q, k, v, lengths = operands
        # It takes [batch, tokens, heads, head_dim] and turns it around: so turned, nothing is left to be moved.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        return library.gqa(q[:, 0], k, v, kv_seq_len=lengths, sm_scale=case.problem().scale)[:, None]

    return _contender(name, attend, (inputs.q, inputs.k, inputs.v, _ragged(case, inputs)))


def _pallas_paged(name: str, case: Any, inputs: Any) -> Contender:
    from jax.experimental.pallas.ops.gpu import paged_attention as library

    pages = inputs.page_table.shape[1]
    splits = next(n for n in range(PALLAS_SPLITS, 0, -1) if pages % n == 0)
    together = next(n for n in range(PAGES_AT_A_TIME, 0, -1) if pages // splits % n == 0)
    num_pages = inputs.k.shape[0]
    # It has KV heads first, and reads dead pages; pages of other sequences are poison here.
    k, v = (jnp.nan_to_num(jnp.swapaxes(part, 0, 1)) for part in (inputs.k, inputs.v))
    table = jnp.minimum(inputs.page_table, num_pages - 1)

    def attend(operands: Any) -> jax.Array:
        q, k, v, table, lengths = operands
        scaled = (q[:, 0].astype(jnp.float32) * case.problem().scale).astype(q.dtype)
        return library.paged_attention(scaled, k, v, table, lengths, k_splits=splits, pages_per_compute_block=together)[
            :, None
        ]

    return _contender(name, attend, (inputs.q, k, v, table, inputs.lengths))


def _paged(case: Any) -> str | None:
    return first("a dense cache" if case.page_size is None else None, plain_attention(case))


def _dense_product(name: str, case: Any, inputs: Any) -> Contender:
    dtype = jnp.dtype(case.dtype)
    dense = dequantize(inputs.w, dtype)

    def multiply(operands: Any) -> jax.Array:
        x, w = operands
        y = jnp.dot(x, w, preferred_element_type=jnp.float32)
        if case.gated:
            gate, up = jnp.split(y, 2, axis=1)
            y = (gate if case.activation is None else case.activation(gate)) * up
        elif case.activation is not None:
            y = case.activation(y)
        return y.astype(case.out_dtype or dtype)

    return _contender(name, multiply, (inputs.x, dense))


def _no_layers_nor_bias(case: Any) -> str | None:
    return first(
        "a stack of layers" if case.num_layers is not None else None,
        "a bias" if case.bias else None,
        "quantized activations" if case.quantize_x is not None else None,
    )


def _needs_cudnn(case: Any) -> str | None:
    return first("float32" if case.dtype == "float32" else None, _dense(case))


PEERS: Final = (
    Peer("jax-nn-xla", "decode_attention", lambda: None, _dense, _jax_nn("xla")),
    Peer("jax-nn-cudnn", "decode_attention", _needs_gpu, _needs_cudnn, _jax_nn("cudnn")),
    Peer("jax-pallas-decode", "decode_attention", _needs_gpu, _dense, _pallas_decode),
    Peer("jax-pallas-paged", "decode_attention", _needs_gpu, _paged, _pallas_paged),
    Peer("dense-dot", "quantized_matmul", lambda: None, _no_layers_nor_bias, _dense_product),
)
"""A dense product reads weights of x's dtype: what quantized weights are to beat. On a GPU it is cuBLAS."""
