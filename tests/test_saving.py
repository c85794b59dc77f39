"""Quantized weights are saved and loaded bit for bit, by us and by other libraries."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as orbax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from palladion import QuantizedArray, load_tree, quantize, quantize_tree, save_tree
from palladion.benchmarks.static.gpu import compiler as gpu_compiler
from palladion.frameworks.serialization import register_flax_serialization
from palladion.reference.quantization import ORDERS
from palladion.reference.saving import DTYPES

SCHEMES = ("int8", "int8-g32-zeros", "int4-g32-minimums", "float8_e4m3fn", "float8_e5m2-g32", "mxfp4")


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def bits(tree: Any) -> Any:
    """Returns the structure of a tree, with scheme and order, and the dtypes, shapes and bytes of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [
        (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) if hasattr(leaf, "dtype") else leaf for leaf in leaves
    ]


@functools.cache
def weights(order: Any) -> dict[str, Any]:
    return {scheme: quantize(normal(2, 64, 24), scheme, order=order) for scheme in SCHEMES}


@pytest.mark.parametrize("order", ORDERS)
def test_quantized_weights_are_saved_bit_for_bit(order: Any, tmp_path: Path):
    tree = {"layers": [weights(order), {"w": quantize(jnp.full((64, 8), jnp.nan), "int8", order=order).T}]}
    save_tree(tmp_path / "w.safetensors", tree)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert bits(load_tree(tmp_path / "w.safetensors", order=order)) == bits(tree)
    other = "in_out" if order == "out_in" else "out_in"
    converted = load_tree(tmp_path / "w.safetensors", order=other)
    assert bits(converted["layers"][0]) == bits({name: w.with_order(other) for name, w in weights(order).items()})
    with gpu_compiler.tracing_for(90):
        loaded = load_tree(tmp_path / "w.safetensors")["layers"][0]
    assert {w.order for w in loaded.values()} == {"out_in"}
    assert load_tree(tmp_path / "w.safetensors")["layers"][1]["w"].T.order == "in_out"


@pytest.mark.parametrize("x64", [False, True])
def test_trees_and_dtypes_are_kept(x64: bool, tmp_path: Path):
    tree = {
        "arrays": {name: normal(3, 5).astype(np.dtype(getattr(ml_dtypes, name, name))) for name in DTYPES.values()},
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.int8),
        "transposed": normal(4, 6).T,
        "numbered": {7: (1, 2.5, "text", None, True, [normal(2)]), 10: {}},
    }
    with jax.enable_x64(x64):
        save_tree(tmp_path / "tree.safetensors", tree)
        loaded = load_tree(tmp_path / "tree.safetensors")
    assert bits(loaded) == bits(tree)
    assert isinstance(loaded["arrays"]["bfloat16"], jax.Array)
    assert isinstance(loaded["arrays"]["float64"], jax.Array if x64 else np.ndarray)
    assert loaded["numbered"][7][:5] == (1, 2.5, "text", None, True)
    for alone in (jnp.asarray(normal(3)), quantize(normal(64, 8), "int4")):
        save_tree(tmp_path / "tree.safetensors", alone)
        assert bits(load_tree(tmp_path / "tree.safetensors")) == bits(alone)


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    tree = {"a": normal(3, 4), "b": [quantize(normal(64, 8), "int8-g32", scale_dtype=jnp.bfloat16)]}
    save_tree(path, tree)
    with safetensors.safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("a", "b.0.values", "b.0.scales")}
        metadata = file.metadata()
        assert len(file.keys()) == len(tensors)
    np.testing.assert_array_equal(tensors["a"], tree["a"])
    assert tensors["b.0.scales"].dtype == "bfloat16"
    safetensors.numpy.save_file(tensors, path, metadata)
    assert bits(load_tree(path)) == bits({"a": jnp.asarray(tree["a"]), "b": tree["b"]})


def test_an_nnx_state(tmp_path: Path):
    state = nnx.state(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    pure = nnx.to_pure_dict(jax.tree.map(lambda x: quantize(x, "mxfp4") if x.ndim == 2 else x, state))
    save_tree(tmp_path / "state.safetensors", pure)
    assert bits(load_tree(tmp_path / "state.safetensors")) == bits(pure)


def test_the_leaves_of_an_equinox_module(tmp_path: Path):
    layer = equinox.nn.Linear(64, 8, key=jax.random.key(0))
    layer, _ = quantize_tree(layer, "int4-g32", where="weight", transposed=True)
    save_tree(tmp_path / "leaves.safetensors", jax.tree.leaves(layer))
    leaves = load_tree(tmp_path / "leaves.safetensors")
    assert bits(jax.tree.unflatten(jax.tree.structure(layer), leaves)) == bits(layer)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": object()}}, r"save_tree: a.b: got object; accepted: dicts, lists .*to_pure_dict"),
        ({"a": {(1, 2): 3}}, r"save_tree: a: got the key \(1, 2\); accepted: strings and integers"),
        ({"a": jnp.ones(3, jnp.int4)}, "save_tree: a: got int4; accepted: bool, uint8"),
        ({"a": jax.random.key(0)}, "save_tree: a: got key<fry>"),
        ({"a.b": normal(2), "a": {"b": normal(2)}}, "save_tree: a.b: two arrays of the tree have this name"),
        ({"a": jax.eval_shape(lambda: jnp.ones(3))}, "save_tree: a: got ShapeDtypeStruct"),
    ],
)
def test_what_cannot_be_saved(tree: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        save_tree(tmp_path / "tree.safetensors", tree)
    assert not list(tmp_path.iterdir())


def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Returns a function that changes the header and our metadata of a file."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        tree = json.loads(header["__metadata__"]["palladion"])
        change(header, tree)
        header["__metadata__"]["palladion"] = json.dumps(tree)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return rewrite


def of_weight(name: str, **entries: Any) -> Callable[[bytes], bytes]:
    return changed(lambda header, _: header[f"w.{name}"].update(entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"w\.\w+: the file ends before it: it was cut short"),
        (lambda data: data[:20], "header: longer than the file"),
        (lambda data: data[:0], "header: longer than the file"),
        (lambda data: b"GGUF" + data, "header: longer than the file: not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "header: not a safetensors file, or damaged"),
        (lambda data: data[:8] + b"{\xff" + data[10:], "header: not a safetensors file, or damaged"),
        (changed(lambda header, _: header.pop("w.scales")), "w.scales: no such tensor in the file"),
        (of_weight("values", dtype="F4"), "w.values: damaged entry of the header"),
        (of_weight("values", shape=[31, 8]), r"w.values: uint8 \[31, 8\] at bytes .*, which is not its size"),
        (of_weight("values", shape=[-32, -8]), "w.values: .* is not its size"),
        (of_weight("values", data_offsets=[10**9, 10**9 + 256]), "w.values: the file ends before it"),
        (of_weight("values", data_offsets=[-300, -44]), "w.values: .* is not its size"),
        (of_weight("values", data_offsets=None), "w.values: damaged entry"),
        (of_weight("values", dtype="I8"), "w: w.values: got int8; accepted: uint8"),
        (of_weight("values", shape=[256]), r"w: w.values: got shape \(256,\); accepted: two or more"),
        (of_weight("values", shape=[8, 32]), "w: int4-g32: in = 16 is not a multiple"),
        (of_weight("scales", dtype="I32"), "w: w.scales: got int32; accepted: floating"),
        (of_weight("scales", shape=[8, 2]), r"w: w.scales: got shape \(8, 2\); accepted: \(2, 8\)"),
        (changed(lambda _, tree: tree["dict"][0][1].update(scheme="int5")), "w: scheme: got 'int5'"),
        (changed(lambda _, tree: tree["dict"][0][1].update(scheme="int4-g32-zeros")), "w.zeros: no such tensor"),
        (changed(lambda _, tree: tree["dict"][0][1].update(order="out")), "w: order: got 'out'"),
        (changed(lambda _, tree: tree["dict"][0][1].pop("order")), "metadata: damaged, or of a newer version"),
        (changed(lambda _, tree: tree.update(set=tree.pop("dict"))), "metadata: damaged, or of a newer version"),
        (changed(lambda _, tree: tree.update(more=1)), "metadata: damaged, or of a newer version"),
        (lambda data: data.replace(b'"{\\"dict', b'"[\\"dict'), "header: not a safetensors file, or damaged"),
    ],
)
def test_damaged_files_name_the_tensor(damage: Callable[[bytes], bytes], message: str, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_tree(path, {"w": quantize(normal(64, 8), "int4-g32")})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"w.safetensors: ({message})"):
        load_tree(path)


def test_files_of_others_are_not_read(tmp_path: Path):
    safetensors.numpy.save_file({"a": normal(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain.safetensors: metadata: has no tree: .*safetensors.flax.load_file"):
        load_tree(tmp_path / "plain.safetensors")
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="order: got 'out'"):
        load_tree(tmp_path / "plain.safetensors", order="out")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_flax_serialization(order: Any):
    register_flax_serialization()
    register_flax_serialization()
    tree = weights(order) | {"turned": quantize(normal(64, 24), "int4-g32", order=order).mT, "bias": normal(3)}
    target = jax.tree.map(jnp.zeros_like, tree)
    assert bits(flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree))) == bits(tree)
    state = flax.serialization.to_state_dict(tree)
    other = jax.tree.map(
        lambda w: w.with_order("in_out") if isinstance(w, QuantizedArray) else w,
        target,
        is_leaf=lambda w: isinstance(w, QuantizedArray),
    )
    restored = flax.serialization.from_state_dict(other, state)
    assert all(restored[name] == tree[name].with_order("in_out") for name in SCHEMES)
    with pytest.raises(ValueError, match="got a weight in mxfp4; accepted: int8, that of the target"):
        flax.serialization.from_state_dict(tree["int8"], state["mxfp4"])
    with pytest.raises(ValueError, match=r"got a weight \(2, 64, 24\); accepted: \(64, 24\)"):
        flax.serialization.from_state_dict(tree["int8"][0], state["int8"])


@pytest.mark.parametrize("order", ORDERS)
def test_orbax(order: Any, tmp_path: Path):
    tree = weights(order) | {"turned": quantize(normal(64, 24), "int4-g32", order=order).T}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: tree))
    assert bits(restored) == bits(tree)
