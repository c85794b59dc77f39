"""Merging new tokens into a block, as bits in 32-bit words: no number is converted, whatever the dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palladion.kernels.append_kv.mosaic_tpu.layout import BlockLayout


def merge(buffer: Any, new: jax.Array, begin: jax.Array, end: jax.Array, layout: BlockLayout) -> None:
    """Writes new tokens into a block.

    Args:
      buffer: ref of the block.
      new: words of a block, with new tokens at their positions in it.
      begin: first token of the block that is new.
      end: the token after the last new one.
      layout: layout of the block.
    """
    old = _words(buffer[...])
    mask = _token_mask(begin, end, old.shape, layout)
    buffer[...] = pltpu.bitcast((new.reshape(old.shape) & mask) | (old & ~mask), buffer.dtype)


def shifted_tokens(new_tokens: Any, source: jax.Array, begin: jax.Array, layout: BlockLayout) -> jax.Array:
    """Returns words of a block with new tokens shifted to their positions in it.

    Args:
      new_tokens: ref of the new tokens in VMEM.
      source: index there of the block's first new token.
      begin: position of that token in the block.
      layout: layout of the block.
    """
    axis, per_word = layout.token_axis, layout.tokens_per_word
    start = source - jax.lax.rem(source, layout.tile_tokens)
    start = jnp.minimum(start, layout.buffer_tokens - layout.read_tokens)
    words = _words(new_tokens[:, *layout.token_index(pl.multiple_of(start, layout.tile_tokens), layout.read_tokens)])
    shift = begin - (source - start)
    shift = jnp.where(shift < 0, shift + layout.read_tokens, shift)
    rolled = pltpu.roll(words, jax.lax.div(shift, per_word), axis)
    if per_word > 1:
        # The rest of the shift is less than a word: bits that leave a word enter the next one.
        previous = pltpu.roll(rolled, 1, axis)
        bits = jax.lax.rem(shift, per_word) * (32 // per_word)
        left, right = (jnp.broadcast_to(n, words.shape) for n in (bits, 32 - bits))
        moved = jax.lax.shift_left(rolled, left) | jax.lax.shift_right_logical(previous, right)
        rolled = jnp.where(bits == 0, rolled, moved)
    return jax.lax.slice_in_dim(rolled, 0, layout.block_tokens // per_word, axis=axis)


def _words(x: jax.Array) -> jax.Array:
    """Returns the same bits as int32: narrower numbers share a word with those in the rows below."""
    return pltpu.bitcast(x, jnp.int32)


def _token_mask(begin: jax.Array, end: jax.Array, shape: tuple[int, ...], layout: BlockLayout) -> jax.Array:
    """Returns words of a block whose bits are set for tokens `begin` to `end`."""
    per_word = layout.tokens_per_word
    token = jax.lax.broadcasted_iota(jnp.int32, shape, layout.token_axis) * per_word
    width = 32 // per_word
    mask = jnp.zeros(shape, jnp.int32)
    for n in range(per_word):
        bits = jnp.uint32(((1 << width) - 1) << (n * width)).view(jnp.int32)
        mask |= jnp.where((token + n >= begin) & (token + n < end), bits, 0)
    return mask
