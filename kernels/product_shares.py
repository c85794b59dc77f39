"""Exchange between devices for a product, besides sums: mean squares of a norm, and gates and ups."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, weight: jax.Array, eps: float, in_features: int, axes: tuple[str, ...]) -> jax.Array:
    """Returns the RMS norm of a device's part of rows.

    Args:
      x: `[rows, part of in]`.
      weight: the norm's weight, `[part of in]`.
      eps: number added to the mean square.
      in_features: length of a whole row.
      axes: the mesh axes over which rows are cut.
    """
    wide = x.astype(jnp.float32)
    squares = jax.lax.psum(jnp.sum(wide * wide, axis=-1, keepdims=True), axes)
    return (wide * jax.lax.rsqrt(squares / in_features + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def exchange_gates(y: jax.Array, axes: tuple[str, ...], shards: int) -> list[jax.Array]:
    """Returns the gates and the ups of a device's share of results, each `[rows, out / 2 / shards]`.

    All gates, then all ups, are cut into 2 * shards pieces, of which device d has 2d and 2d + 1 and needs d and
    d + shards. Two permutations bring them: `rounds` says which piece goes in which.

    Args:
      y: channels of a joined product, `[rows, out / shards]`, sharded in order.
      axes: the mesh axes over which they are sharded.
      shards: number of shards.
    """
    rounds = [0] * (2 * shards)
    seen: set[int] = set()
    for piece in range(2 * shards):
        # A device's other piece goes in the other round, and so does the other piece that a device needs.
        while piece not in seen:
            other = piece ^ 1
            rounds[other] = 1
            seen |= {piece, other}
            piece = (other + shards) % (2 * shards)
    device = jax.lax.axis_index(axes)
    pieces = jnp.stack(jnp.split(y, 2, axis=-1))
    odd = jnp.asarray(rounds)[2 * device]  # whether the device sends its first piece in the second round
    received = []
    for number in (0, 1):
        routes = [(piece // 2, piece % shards) for piece in range(2 * shards) if rounds[piece] == number]
        received.append(jax.lax.ppermute(pieces[odd ^ number], axes, routes))
    swapped = jnp.asarray(rounds)[device] == 1  # whether its gates came in the second round
    first, second = received
    return [jnp.where(swapped, second, first), jnp.where(swapped, first, second)]
