"""decode_attention for benchmarks; a sample of heads is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.operations.base import CallOptions, Operation, Verdict, spread, verdict_of
from palladion.kernels import decode_attention as package
from palladion.kernels.decode_attention import Inputs, cases
from palladion.kernels.decode_attention.cases import Case
from palladion.reference import oracle
from palladion.reference.compare import compare

SAMPLED_HEADS: Final = 4
SAMPLED_QUERIES: Final = 3


class DecodeAttention(Operation):
    """decode_attention. A result is `out` alone, because most peers return nothing else."""

    name = "decode_attention"
    cases: ClassVar[Any] = cases
    package: ClassVar[Any] = package

    def bytes_moved(self, case: Case) -> int:
        """Returns the bytes that a call must move with the case's lengths."""
        return int(case.problem().bytes_moved(case.filled))

    def flops(self, case: Case) -> int:
        """Returns the floating-point operations of a call with the case's lengths."""
        return int(case.problem().flops(case.filled))

    def function(self, case: Case, **call: Unpack[CallOptions]) -> Callable[[Inputs], jax.Array]:
        """Implements `Operation.function`."""

        def attend(inputs: Inputs) -> jax.Array:
            return package.decode_attention(**inputs._asdict(), **case.options, **call)

        return attend

    def judge(self, case: Case, inputs: Inputs, result: Any, reference: Any) -> Verdict:
        """Implements `Operation.judge`."""
        group = case.q_heads // case.kv_heads
        layer = None if inputs.layer is None else int(inputs.layer)
        lengths = np.asarray(case.filled)
        sample = [(b, h) for b in spread(case.batch, SAMPLED_HEADS) for h in spread(case.q_heads, SAMPLED_HEADS)]
        sample = [sample[i] for i in spread(len(sample), SAMPLED_HEADS)]
        # The shortest and the longest sequence are the likeliest to go wrong.
        sample += [(int(b), case.q_heads - 1) for b in {lengths.argmin(), lengths.argmax()}]
        ours, theirs, exact = [], [], []
        for b, h in sample:
            arrays = {
                name: _head(getattr(inputs, name), layer, inputs.page_table, b, h // group)
                for name in ("k", "v", "k_scale", "v_scale")
            }
            pages = None if inputs.page_table is None else np.arange(inputs.page_table.shape[1])[None]
            for i in spread(case.q_len, SAMPLED_QUERIES):
                out, _ = oracle.decode_attention(
                    q=np.asarray(inputs.q[b : b + 1, i : i + 1, h : h + 1]),
                    # Query i attends as if it were the newest token.
                    lengths=np.maximum(lengths[b : b + 1] - (case.q_len - 1 - i), 0),
                    page_table=pages,
                    sinks=None if inputs.sinks is None else np.asarray(inputs.sinks[h : h + 1]),
                    **arrays,
                    **case.options,
                )
                exact.append(out[0, 0, 0])
                ours.append(np.asarray(result[b, i, h]))
                theirs.append(np.asarray(reference[b, i, h]))
        return verdict_of(compare(np.stack(ours), np.stack(theirs), np.stack(exact)))


def _head(array: jax.Array | None, layer: int | None, page_table: jax.Array | None, b: int, head: int) -> Any:
    """Returns one sequence's and one KV head's slice of a cache array: dense, or its pages in order."""
    if array is None:
        return None
    array = array if layer is None else array[layer]
    if page_table is None:
        return np.asarray(array[b : b + 1, head : head + 1])
    # Dead entries of the page table may be out of range.
    return np.asarray(jnp.take(array[:, head : head + 1], page_table[b], axis=0, mode="clip"))
