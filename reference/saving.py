"""`save_tree` and `load_tree`: files of arrays and quantized weights, in the safetensors format.

The format is a header of names, dtypes, shapes and offsets in JSON, and the bytes of all tensors after it. Every tool
for safetensors reads the tensors; the parts of a quantized weight are tensors of their own, `<path>.values`,
`<path>.scales`, … . The entry "palladion" of the header's metadata has what the format has no place for, in JSON: the
nesting of the tree, and scheme and order of each weight. Only one array is in the memory of the host at a time.

The package `safetensors` is not used: it knows no NumPy dtype for bfloat16, float8 and e8m0, and reads whole files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from palladion.reference.quantization import Order, QuantizedArray, check_order, check_parts, order_of_platform
from palladion.reference.scheme import Scheme
from palladion.reference.transposed import TransposedWeight

DTYPES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""Dtypes of the format by its names for them."""

METADATA: Final = "palladion"
"""Name of our entry in the metadata of a file."""

LENGTH_BYTES: Final = 8
"""Bytes before the header, which hold its length."""

Constant = None | bool | int | float | str


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Saves a tree of arrays and quantized weights as a safetensors file, bit for bit.

    The file appears under its name when it is complete; a file that had the name is replaced.

    Args:
      path: path of the file, usually "….safetensors".
      tree: nested dicts (keys are strings or integers), lists and tuples of arrays, `QuantizedArray`s,
        `TransposedWeight`s, numbers, strings and None. `flax.nnx.to_pure_dict` makes that of an NNX state, and
        `jax.tree.leaves(tree)` of any pytree, which `jax.tree.unflatten` restores.

    Raises:
      ValueError: the tree holds something else, or an array of a dtype that the format does not have; the message
        names where.
    """
    arrays: dict[str, Any] = {}
    described = _describe(tree, (), arrays)
    header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(described)}}
    codes = {name: code for code, name in DTYPES.items()}
    end = 0
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)  # so that each is aligned
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.size * array.dtype.itemsize
        header[name] = {"dtype": codes[str(array.dtype)], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for name in names:
                file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tree(path: str | os.PathLike[str], *, order: Order | None = None) -> Any:
    """Loads a tree that `save_tree` has saved, its arrays onto JAX's default device.

    Args:
      path: path of the file.
      order: storage order that quantized weights get, "in_out" or "out_in"; None means that of the platform's kernels.

    Returns:
      The tree. Arrays of 64-bit dtypes are NumPy's where `jax_enable_x64` is off.

    Raises:
      ValueError: the file was not written by `save_tree`, or is damaged; the message names the file and the tensor.
      OSError: the file cannot be read.
    """
    order = order_of_platform() if order is None else order
    check_order(order)
    with open(path, "rb") as file:
        return _Loader(file, os.fspath(path), order).load()


def _describe(node: Any, keys: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns what a file has to know of a tree, and adds its arrays to `arrays` by name.

    Args:
      node: the tree.
      keys: the keys that lead to it.
      arrays: arrays found so far.
    """
    name = ".".join(keys) or "tree"
    if isinstance(node, Constant):
        return {"constant": node}
    if isinstance(node, TransposedWeight):
        return {"transposed": _describe(node.matrix, keys, arrays)}
    if isinstance(node, QuantizedArray):
        for field in dataclasses.fields(node):
            part = getattr(node, field.name)
            if isinstance(part, jax.Array | np.ndarray):
                _add(f"{name}.{field.name}", part, arrays)
        return {"quantized": name, "scheme": str(node.scheme), "order": node.order}
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        _add(name, node, arrays)
        return {"array": name}
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str | int):
                raise ValueError(f"save_tree: {name}: got the key {key!r}; accepted: strings and integers")
        return {"dict": [[key, _describe(value, (*keys, str(key)), arrays)] for key, value in node.items()]}
    if type(node) in (list, tuple):
        items = [_describe(value, (*keys, str(n)), arrays) for n, value in enumerate(node)]
        return {type(node).__name__: items}
    raise ValueError(
        f"save_tree: {name}: got {type(node).__name__}; accepted: dicts, lists and tuples of arrays, QuantizedArrays, "
        "numbers, strings and None; flax.nnx.to_pure_dict makes that of an NNX state, jax.tree.leaves of any pytree"
    )


def _add(name: str, array: Any, arrays: dict[str, Any]) -> None:
    """Adds an array by its name; raises ValueError where the file cannot have it."""
    if str(array.dtype) not in DTYPES.values():
        raise ValueError(f"save_tree: {name}: got {array.dtype}; accepted: {', '.join(DTYPES.values())}")
    if name in arrays:
        raise ValueError(f"save_tree: {name}: two arrays of the tree have this name; rename a key that has dots")
    arrays[name] = array


class _Loader:
    """Builds the tree of an open file."""

    def __init__(self, file: BinaryIO, path: str, order: Order) -> None:
        self._file = file
        self._path = path
        self._order = order
        self._size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        self._start = LENGTH_BYTES + length
        if self._start > self._size:
            self._fail("header", "longer than the file: not a safetensors file, or cut short")
        try:
            self._tensors = json.loads(file.read(length))
            described = self._tensors.pop("__metadata__", {}).get(METADATA)
            self._tree: Any = None if described is None else json.loads(described)
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            self._fail("header", f"not a safetensors file, or damaged ({error})")
        if self._tree is None:
            self._fail("metadata", "has no tree: save_tree did not write it; safetensors.flax.load_file may read it")

    def _fail(self, tensor: str, reason: str) -> NoReturn:
        raise ValueError(f"{self._path}: {tensor}: {reason}")

    def load(self) -> Any:
        """Returns the tree."""
        try:
            return self._build(self._tree)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            self._fail("metadata", f"damaged, or of a newer version ({error!r})")

    def _build(self, node: dict[str, Any]) -> Any:
        """Returns the tree that a node of the metadata describes."""
        if "quantized" in node:
            return self._quantized(node["quantized"], node["scheme"], node["order"])
        if len(node) != 1:
            raise KeyError(*node)
        ((kind, held),) = node.items()
        if kind == "constant":
            return held
        if kind == "array":
            return self._read(held)
        if kind == "transposed":
            return TransposedWeight(self._build(held))
        if kind == "dict":
            return {key: self._build(value) for key, value in held}
        return {"list": list, "tuple": tuple}[kind](self._build(value) for value in held)

    def _quantized(self, name: str, scheme: str, order: Order) -> QuantizedArray:
        """Reads a quantized weight, and checks that its parts agree."""
        try:
            check_order(order)
            parsed = Scheme.parse(scheme)
        except ValueError as error:
            self._fail(name, str(error))
        zeros, minimums = (
            self._read(f"{name}.{part}") if parsed.offset == part else None for part in ("zeros", "minimums")
        )
        w = QuantizedArray(self._read(f"{name}.values"), self._read(f"{name}.scales"), zeros, minimums, parsed, order)
        try:
            check_parts(w)
        except ValueError as error:
            self._fail(name, str(error))
        return w.with_order(self._order)

    def _read(self, name: str) -> Any:
        """Reads a tensor."""
        if name not in self._tensors:
            self._fail(name, "no such tensor in the file")
        entry = self._tensors[name]
        try:
            dtype = jnp.dtype(DTYPES[entry["dtype"]])
            shape = tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            self._fail(name, f"damaged entry of the header ({error!r})")
        if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            self._fail(name, f"{dtype.name} {list(shape)} at bytes {begin} to {end}, which is not its size")
        if self._start + end > self._size:
            self._fail(name, "the file ends before it: it was cut short")
        self._file.seek(self._start + begin)
        array = np.fromfile(self._file, np.uint8, end - begin).view(dtype).reshape(shape)
        return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(dtype) == dtype else array
