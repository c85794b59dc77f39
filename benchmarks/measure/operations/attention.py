"""decode_attention: a sample of heads is judged, each computed from everything that it depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.operations.base import Operation, Verdict, spread, verdict_of
from palladion.kernels import decode_attention as package
from palladion.kernels.decode_attention import cases
from palladion.reference import oracle
from palladion.reference.compare import compare

SAMPLED_HEADS: Final = 4
SAMPLED_QUERIES: Final = 3


class DecodeAttention(Operation):
    """decode_attention; a result is `out` alone, as most peers have no more."""

    name = "decode_attention"
    cases: ClassVar[Any] = cases
    package: ClassVar[Any] = package

    def bytes_moved(self, case: Any) -> int:
        """Bytes that a call must move, as full as its caches are."""
        return int(case.problem().bytes_moved(case.filled))

    def flops(self, case: Any) -> int:
        """Floating-point operations of a call, as full as its caches are."""
        return int(case.problem().flops(case.filled))

    def function(self, case: Any, **how: Any) -> Callable[..., Any]:
        """As `Operation` has it."""

        def attend(inputs: Any) -> jax.Array:
            return package.decode_attention(**inputs._asdict(), **case.options, **how)

        return attend

    def judge(self, case: Any, inputs: Any, result: Any, reference: Any) -> Verdict:
        """As `Operation` has it."""
        group = case.q_heads // case.kv_heads
        layer = None if inputs.layer is None else int(inputs.layer)
        lengths = np.asarray(case.filled)
        places = [(b, h) for b in spread(case.batch, SAMPLED_HEADS) for h in spread(case.q_heads, SAMPLED_HEADS)]
        places = [places[i] for i in spread(len(places), SAMPLED_HEADS)]
        # The sequences that are special first: the shortest and the longest.
        places += [(int(b), case.q_heads - 1) for b in {lengths.argmin(), lengths.argmax()}]
        ours, theirs, exact = [], [], []
        for b, h in places:
            for i in spread(case.q_len, SAMPLED_QUERIES):
                head = h // group
                arrays = {
                    name: _of_head(getattr(inputs, name), layer, inputs.page_table, b, head)
                    for name in ("k", "v", "k_scale", "v_scale")
                }
                pages = None if inputs.page_table is None else np.arange(inputs.page_table.shape[1])[None]
                out, _ = oracle.decode_attention(
                    q=np.asarray(inputs.q[b : b + 1, i : i + 1, h : h + 1]),
                    # Query i sees what is there when it is the newest.
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


def _of_head(part: Any, layer: int | None, page_table: Any, b: int, head: int) -> Any:
    """A part of the cache of one sequence and KV head, as the oracle takes it: dense, or its pages in order."""
    if part is None:
        return None
    part = part if layer is None else part[layer]
    if page_table is None:
        return np.asarray(part[b : b + 1, head : head + 1])
    # Dead entries point anywhere.
    return np.asarray(jnp.take(part[:, head : head + 1], page_table[b], axis=0, mode="clip"))
