"""Named append_qkv workloads, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.kernels.append_kv import cases as append
from palladion.kernels.append_qkv.problem import Inputs, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(append.Case):
    """A workload of append_kv, with query heads and rotation.

    Attributes:
      q_heads: number of query heads.
      rotary_dim: number of features of a head that are rotated; None for all.
    """

    q_heads: int
    rotary_dim: int | None = None

    def shapes(self) -> Any:
        """Returns the shapes and dtypes of the inputs, which are enough to compile."""
        written = super().shapes()
        pairs = (self.rotary_dim or self.head_dim) // 2
        angles: Any = jax.ShapeDtypeStruct((self.batch, self.q_len, pairs), jnp.float32)
        heads = (self.batch, self.q_len, self.q_heads + 2 * self.kv_heads, self.head_dim)
        qkv: Any = jax.ShapeDtypeStruct(heads, written.k.dtype)
        return Inputs(written.cache, qkv, written.lengths, angles, angles, written.new_tokens, written.layer)

    def problem(self) -> Any:
        """Returns the problem of a call with this case's inputs."""
        problems: list[Problem] = []
        jax.eval_shape(lambda inputs: problems.append(Problem.of(inputs)), self.shapes())
        return problems[0]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns normal-distributed heads, with lengths and a cache as in append_kv's `make_inputs`."""
    written = append.make_inputs(case, seed)
    rng = np.random.default_rng(seed + 1)
    q = rng.standard_normal((case.batch, case.q_len, case.q_heads, case.head_dim), np.float32)
    pairs = (case.rotary_dim or case.head_dim) // 2
    position = np.asarray(case.filled)[:, None] - case.q_len + np.arange(case.q_len)
    angle = position[..., None] * 10_000.0 ** (-np.arange(pairs) / pairs)
    return Inputs(
        cache=written.cache,
        qkv=jnp.concatenate([jnp.asarray(q).astype(case.dtype), written.k, written.v], axis=2),
        lengths=written.lengths,
        cosine=jnp.asarray(np.cos(angle), jnp.float32),
        sine=jnp.asarray(np.sin(angle), jnp.float32),
        new_tokens=written.new_tokens,
        layer=written.layer,
    )


_SMALL: Final = Case(
    name="", batch=3, q_heads=4, kv_heads=2, head_dim=128, max_len=256, dtype="float32", lengths=(1, 129, 256)
)


def _small(name: str, **changes: Any) -> Case:
    return dataclasses.replace(_SMALL, name=name, **changes)


TESTS: Final = (
    _small("float32"),
    _small("bfloat16", dtype="bfloat16", lengths=(6, 129, 0)),
    _small("wider-cache", dtype="bfloat16", kv_dtype="float32"),
    _small("int8", dtype="bfloat16", kv_dtype="int8", num_layers=2),
    _small("multi-query", kv_heads=1, q_heads=5, head_dim=64, dtype="bfloat16", num_layers=2),
    _small("head-dim-80", head_dim=80, kv_heads=3, q_heads=3),
    _small("rotary-dim-32", head_dim=80, rotary_dim=32, q_len=3, lengths=(3, 2, 200)),
    _small("verify", batch=5, dtype="bfloat16", q_len=4, lengths=(0, 1, 3, 128, 255)),
    _small("prefill", q_len=70, dtype="bfloat16", lengths=(40, 150, 255), new_tokens=(7, 70, 31), num_layers=2),
    _small("paged", page_size=16, max_len=64, q_len=3, dtype="bfloat16", lengths=(1, 17, 50), num_layers=2),
)
"""Small cases for tests, each with a property that is easy to get wrong."""

_LLAMA: Final = Case(name="llama-3-8b", batch=1, q_heads=32, kv_heads=8, head_dim=128, max_len=8192)

MODELS: Final = (
    _LLAMA,
    dataclasses.replace(_LLAMA, name="llama-3-8b-64", batch=64, max_len=4096, num_layers=2),
    dataclasses.replace(_LLAMA, name="llama-3-8b-paged", batch=8, max_len=4096, page_size=16, num_layers=2),
    dataclasses.replace(_LLAMA, name="llama-3-8b-int8", batch=8, max_len=4096, kv_dtype="int8"),
    dataclasses.replace(_LLAMA, name="llama-3-8b-prefill", q_len=512, max_len=4096),
    Case(name="smollm2-135m", batch=1, q_heads=9, kv_heads=3, head_dim=64, max_len=2048, num_layers=30),
)
"""Cases of real models."""
