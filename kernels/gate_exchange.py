"""The exchange of gates and ups where the channels of a joined product are sharded over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
