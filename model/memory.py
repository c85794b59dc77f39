"""Checks, before weights are read, that a model and its KV cache have room in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from palladion.kernels.integers import round_up
from palladion.kernels.tpu_layout import LANES
from palladion.model.checkpoint_reader import CheckpointReader
from palladion.model.config import ModelConfig
from palladion.reference import KVCache, Scheme


def available_memory() -> int | None:
    """Returns the free memory of JAX's first device in bytes, on a CPU that of this machine; None if not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    # A container may have less than its machine.
    found += [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.isdigit()]
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except OSError:  # other systems have no such file
        return []


def cache_bytes(config: ModelConfig, batch: int, max_len: int, kv_dtype: Any) -> int:
    """Returns the size of a KV cache for a number of sequences."""
    room = round_up(max_len, LANES)
    layer = jax.eval_shape(lambda: KVCache.dense(batch, config.kv_heads, room, config.head_dim, kv_dtype))
    return config.num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))


def least_weight_bytes(reader: CheckpointReader, dtype: Any, scheme: Scheme | None, keep: bool) -> int:
    """Returns the least memory that a checkpoint's weights can take once they are loaded.

    Args:
      reader: the opened checkpoint.
      dtype: dtype of dense weights.
      scheme: scheme that weights are quantized to, or None.
      keep: whether weights stay in the file's own quantization.
    """
    total = 0.0
    for name in reader.tensor_names():
        tensor = reader.tensor(name)
        quantized = (keep and tensor.read_quantized is not None) or scheme is not None
        bits = 8 * jnp.dtype(dtype).itemsize
        if len(tensor.shape) > 1 and quantized:
            bits = 4 if scheme is None or scheme.packed else 8
        total += math.prod(tensor.shape) * bits / 8
    return math.ceil(total)


def check_room(weights: int, cache: int, batch: int, max_len: int) -> None:
    """Raises ValueError where weights and cache, in bytes, are more than the memory that is free."""
    available = available_memory()
    if available is None or weights + cache <= available:
        return
    needed = f"{weights / 1e9:,.1f} GB for the weights at least, and {cache / 1e9:,.1f} GB for the KV cache"
    free = f"{available / 1e9:,.1f} GB of memory are free"
    if weights > available:
        what, ways = "the model", "a smaller model, or a narrower scheme: quantize='int8' or 'int4-g32'"
    else:
        what = f"max_len {max_len}" + (f" in {batch} sequences" if batch > 1 else "")
        ways = "a smaller max_len or batch, or kv_dtype='int8'"
    raise ValueError(f"{what} does not fit: it needs {needed}, and {free}; accepted: what fits, with {ways}")
