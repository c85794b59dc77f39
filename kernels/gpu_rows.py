"""Products of one to four rows of activations and a weight `[out, in]` on a GPU, without tensor cores.

    y[r, o] = sum_i x[r, i] * w[o, i]        result = finish(y)

             in ->
    out      ┌────────┬────────┬───┬────────┬────────┬───┬─      A thread reads 16 bytes of a channel at a time, a warp
     |       │thread 0│thread 1│ … │thread 0│thread 1│ … │       512 bytes that lie side by side: whole cache lines.
     v       ├────────┼────────┼───┼────────┼────────┼───┼─      It takes the same place along `in` in all channels of
             │thread 0│thread 1│ … │thread 0│thread 1│ … │       the block: what it makes of x there serves all of them.
             └────────┴────────┴───┴────────┴────────┴───┴─
              trip 0                trip 1

Grid: (blocks of channels). A program has a block of channels (of gates and of ups, where gated) and all of `in`, so its
sums are complete and no second launch adds up splits. In registers: 16 bytes of each channel, x in the form that meets
them, and a float32 sum for each row and channel. At the end threads are added up, once.

A `Weight` says how a thread reads its share of a channel and multiplies it; `quantized_matmul` and `matmul` have one.

Bound by memory as long as a byte of the weight takes fewer instructions than the GPU has time for: an H200 issues about
7 for a thread and byte, 3.6 of them on integers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from palladion.kernels.devices import gpu_to_plan_for
from palladion.kernels.linear import LinearProblem
from palladion.kernels.types import Ref

MAX_ROWS: Final = 4
"""Most rows of x: with more, tensor cores take less time."""

LOAD_BYTES: Final = 16
"""Bytes of a channel that a thread reads at a time."""

WARP: Final = 32
"""Threads of a warp."""

ENOUGH_BYTES: Final = 40 * 1024
"""Bytes of loads of a multiprocessor that keep the memory busy. An H200 needs 29 KiB (4.8 TB/s times 0.8 µs), and the
assembler issues about two thirds of a program's loads before it waits for the first."""

MAX_WARPS: Final = 8
"""Most warps of a program that `warps_for` returns; a few thousand weights along `in` keep no more of them busy."""


class Share(NamedTuple):
    """The weights of a channel that the threads of a program read in one trip.

    Attributes:
      first: index of the first thread's share, among all shares along `in`.
      threads: threads of the program.
      in_features: weights of a channel.
      ragged: whether the shares of some trip lie beyond the end of `in`.
    """

    first: jax.Array
    threads: int
    in_features: int
    ragged: bool

    def starts(self, per_thread: int) -> jax.Array:
        """Returns where each thread's share begins, `[threads]`, if a share has `per_thread` places."""
        return (self.first + jnp.arange(self.threads, dtype=jnp.int32)) * per_thread

    def places(self, per_thread: int, run: int, offset: int = 0) -> jax.Array:
        """Returns `run` places side by side of each share, from its place `offset` on: `[threads * run]`."""
        place = jnp.arange(self.threads * run, dtype=jnp.int32)
        if run == per_thread:
            return self.first * per_thread + place
        thread, inside = jax.lax.div(place, jnp.int32(run)), jax.lax.rem(place, jnp.int32(run))
        return (self.first + thread) * per_thread + inside + offset

    def exist(self, places: jax.Array, end: int) -> jax.Array | None:
        """Returns which places come before the end; None for all of them."""
        return places < end if self.ragged else None


class Weight(Protocol):
    """A weight as threads read and multiply it."""

    @property
    def per_thread(self) -> int:
        """Weights of a channel that a thread multiplies in a trip, in one or more runs."""

    @property
    def run(self) -> int:
        """Weights of a run, which meet numbers of x that lie side by side."""

    def load(self, share: Share, channels: Sequence[jax.Array]) -> Sequence[Any]:
        """Loads the threads' shares of channels, all of them before the first is used."""

    def operand(self, runs: Sequence[jax.Array]) -> Any:
        """Returns a row of x, float32 `[threads * run]` for each run, in the form that weights are multiplied by."""

    def products(self, loaded: Any, operands: Sequence[Any]) -> list[jax.Array]:
        """Returns for each row the sum of a thread's products, float32 `[threads]`."""


class Norm(NamedTuple):
    """An RMS norm of the rows of x, whose factor for a whole row is applied to its products.

    Attributes:
      weight: `[in]`.
      eps: number added to the mean square.
    """

    weight: Ref
    eps: float


Finish = Callable[[int, list[jax.Array], jax.Array, jax.Array | None], jax.Array]
"""Makes the result `[block_out]` of a row, the products of its parts, the channels, and the mask of real channels."""


def multiply(
    x: Ref,
    out: Ref,
    weight: Weight,
    finish: Finish,
    *,
    problem: LinearProblem,
    block_out: int,
    num_warps: int,
    ahead: bool = False,
    norm: Norm | None = None,
) -> None:
    """Computes a block of channels.

    Args:
      x: `[rows, in]`.
      out: `[rows, result_features]`.
      weight: the weight.
      finish: what becomes of the products.
      problem: what is computed.
      block_out: channels of the block.
      num_warps: warps of the program.
      ahead: whether the loads of a trip are under way while the one before it is multiplied.
      norm: normalizes x, if it is not normalized yet; every program adds up all squares of x.
    """
    p, threads = problem, WARP * num_warps
    step = threads * weight.per_thread
    ragged = p.in_features % step != 0
    first = pl.program_id(0) * block_out
    numbers = [first + place for place in range(block_out)]
    if p.result_features % block_out:
        numbers = [jnp.minimum(number, p.result_features - 1) for number in numbers]
    channels = [number + part * p.result_features for part in range(p.parts) for number in numbers]

    def load_trip(index: Any) -> tuple[Any, ...]:
        share = Share(index * threads, threads, p.in_features, ragged)
        factors = None if norm is None else _read_runs(norm.weight, (), share, weight)
        return weight.load(share, channels), [_read_runs(x, (m,), share, weight) for m in range(p.rows)], factors

    def add(state: tuple[Any, Any], loaded: tuple[Any, ...]) -> tuple[Any, Any]:
        sums, squares = state
        codes, rows, factors = loaded
        if norm is not None:
            squares = [total + _sum_of_squares(runs, weight) for total, runs in zip(squares, rows, strict=True)]
            rows = [[run * factor for run, factor in zip(runs, factors, strict=True)] for runs in rows]
        operands = [weight.operand(runs) for runs in rows]
        products = [product for one in codes for product in weight.products(one, operands)]
        return tuple(total + product for total, product in zip(sums, products, strict=True)), squares

    def trip_ahead(index: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        following = load_trip(index + 1)
        return add(*state), following

    zeros, trips = jnp.zeros(threads, jnp.float32), pl.cdiv(p.in_features, step)
    state = (zeros,) * (len(channels) * p.rows), [zeros] * (0 if norm is None else p.rows)
    if ahead:
        state = add(*jax.lax.fori_loop(0, trips - 1, trip_ahead, (state, load_trip(jnp.int32(0)))))
    else:
        state = jax.lax.fori_loop(0, trips, lambda index, state: add(state, load_trip(index)), state)
    sums, squares = state
    channel = first + jnp.arange(block_out, dtype=jnp.int32)
    real = None if p.result_features % block_out == 0 else channel < p.result_features
    for m in range(p.rows):
        of_row = sums[m :: p.rows]
        parts = [of_row[part * block_out : (part + 1) * block_out] for part in range(p.parts)]
        products = [jnp.sum(_side_by_side(part), axis=0) for part in parts]
        if norm is not None:
            factor = jax.lax.rsqrt(jnp.sum(squares[m]) / p.in_features + norm.eps)
            products = [product * factor for product in products]
        plgpu.store(out.at[m, channel], finish(m, products, channel, real).astype(out.dtype), mask=real)


def _read_runs(ref: Ref, row: tuple[int, ...], share: Share, weight: Weight) -> list[jax.Array]:
    """Reads a thread's numbers of a row of x, or of what there is for each of them, float32, run by run."""
    places = [share.places(weight.per_thread, weight.run, offset) for offset in range(0, weight.per_thread, weight.run)]
    return [read(ref, (*row, place), share.exist(place, share.in_features)) for place in places]


def _sum_of_squares(runs: Sequence[jax.Array], weight: Weight) -> jax.Array:
    """Returns the sum of a thread's squares, `[threads]`."""
    return add_up([column for run in runs for column in columns(run * run, weight.run)])


def load(ref: Ref, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """Returns what is stored, 0 where masked."""
    # Triton casts no integer to an 8-bit float: the zero has the dtype of what is loaded.
    return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def read(ref: Ref, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """Returns numbers of any dtype as float32, 0 where masked."""
    values = load(ref, place, mask)
    if jnp.issubdtype(values.dtype, jnp.integer):
        values = values.astype(jnp.int32)
    return values.astype(jnp.float32)


def columns(x: jax.Array, count: int) -> list[jax.Array]:
    """Returns an array `[n * count]` as `count` arrays `[n]`, the columns of `[n, count]`; a power of two of them.

    Elements of a thread stay with it: Triton moves none of them.
    """
    if count == 1:
        return [x]
    even, odd = (columns(half, count // 2) for half in jnp.unstack(x.reshape(-1, 2), axis=-1))
    return [column for pair in zip(even, odd, strict=True) for column in pair]


def _side_by_side(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns arrays `[n]` as the columns of one array; a power of two of them."""
    if len(arrays) == 1:
        return arrays[0][:, None]
    halves = [_side_by_side(arrays[start::2]) for start in range(2)]
    return jnp.stack(halves, axis=-1).reshape(-1, len(arrays))


def add_up(terms: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of arrays, added one after the other."""
    return functools.reduce(operator.add, terms)


def block_for(problem: LinearProblem, block_out: int) -> int:
    """Returns `block_out`, or fewer channels if some multiprocessor had none: a power of two like `block_out`."""
    while block_out > 1 and pl.cdiv(problem.result_features, block_out) < gpu_to_plan_for().multiprocessors:
        block_out //= 2
    return block_out


def warps_for(problem: LinearProblem, per_thread: int) -> int:
    """Returns warps of a program: the fewest that keep the memory busy, as long as each has weights to read.

    Args:
      problem: what is computed.
      per_thread: weights that a thread multiplies in a trip.
    """
    warps, wanted = 1, ENOUGH_BYTES * gpu_to_plan_for().multiprocessors
    while warps < MAX_WARPS and warps * WARP * per_thread < problem.in_features:
        if problem.out_features * warps * WARP * LOAD_BYTES >= wanted:
            break
        warps *= 2
    return warps
