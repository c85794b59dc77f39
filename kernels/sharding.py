"""Calls on arrays that are sharded over a mesh: every device computes its share of the call.

A `ShardingRule` names the factors of all dimensions. Arrays say over which mesh axes their dimensions are sharded, so
factors are sharded over them, the largest array first; whatever disagrees is resharded.

    Explicit axes   the types of the arrays say how they are sharded: a `jax.shard_map`
    Auto axes       outside of jit the arrays say how they are sharded: a `jax.shard_map`, too. Under jit XLA decides
                    while it compiles: `custom_partitioning`, with the rule for Shardy. Not on a TPU, whose runtime has
                    no callback for it (jax-ml/jax#38196): there "auto" runs XLA's form, and kernels need one of the
                    other ways; `jax.sharding.explicit_axes` makes axes Explicit for a part of a program
    Manual axes     inside `jax.shard_map` arrays are shares already
    a mix of them   shares are taken along Explicit axes; along Auto axes XLA partitions what it can, and has kernels
                    whole on each device
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from palladion.kernels.compat import mapped_mesh_axes
from palladion.reference.derivatives import with_derivatives_of
from palladion.reference.mesh import mesh_axes
from palladion.reference.platforms import target_platform

Dims: TypeAlias = list[tuple[str, ...]]
"""The factors of each dimension of an array, the major one first."""

Axes: TypeAlias = Mapping[str, tuple[str, ...]]
"""The mesh axes over which each sharded factor is sharded."""


WAYS_OUT: Final = (
    "jax.make_mesh(..., axis_types=) with AxisType.Explicit, jax.sharding.explicit_axes(call, in_sharding=), or "
    "jax.shard_map"
)
"""The ways to run kernels on several TPUs, for messages."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Describes how the inputs of a call are sharded.

    Attributes:
      mesh: the mesh, which has devices where the values of the inputs are known.
      axes: the mesh axes along which devices take shares.
      specs: the PartitionSpec of each input.
    """

    mesh: Mesh | AbstractMesh
    axes: set[str]
    specs: Sequence[PartitionSpec]


@dataclasses.dataclass(frozen=True)
class Share:
    """Describes what one device computes.

    Attributes:
      axes: mesh axes over which each sharded factor is sharded.
      shards: number of shards of each sharded factor.
      reduced: mesh axes over which the device's result is a part of the whole result.
    """

    axes: Axes
    shards: Mapping[str, int]
    reduced: tuple[str, ...]

    def of(self, size: int, *factors: str) -> int:
        """Returns this device's part of a size that is cut by the shards of factors."""
        return size // math.prod(self.shards.get(factor, 1) for factor in factors)

    def index(self, factor: str) -> jax.Array | int:
        """Returns which of the shards of a factor this device has."""
        return jax.lax.axis_index(self.axes[factor]) if factor in self.axes else 0


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """Names the dimensions of a call's arrays that belong together, as in einsum.

    Attributes:
      inputs: the inputs, with a string of names in place of each array: "batch q_len (kv_heads group) head_dim".
      results: the same for the results.
      sharded: factors of which a device computes its shard. All others but `reduced` are whole on each device.
      reduced: factors whose shards have partial results, which `run_share` reduces to the whole.
      sizes: sizes of the factors that stand in parentheses; of others, what the number of shards must divide.
      follows: factors of results that are sharded like a factor of the inputs.
    """

    inputs: Any
    results: Any
    sharded: frozenset[str]
    reduced: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    follows: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def dims(self, names: Any) -> list[Dims]:
        """Returns the factors of each dimension of all arrays, without factors of size 1 among several."""
        return [self._parse(name) for name in jax.tree.leaves(names)]

    def mapped(self, in_batched: Sequence[bool]) -> ShardingRule:
        """Returns the rule of the same call under vmap, with a leading dimension in inputs and in all results."""
        inputs = jax.tree.leaves(self.inputs)
        name = f"mapped{sum(factor.startswith('mapped') for factor in self.sharded)}"
        return dataclasses.replace(
            self,
            inputs=[f"{name} {dims}" if batched else dims for dims, batched in zip(inputs, in_batched, strict=True)],
            results=[f"{name} {dims}" for dims in jax.tree.leaves(self.results)],
            sharded=self.sharded | {name},
        )

    def _parse(self, name: str) -> Dims:
        groups = [(inside or alone).split() for inside, alone in re.findall(r"\(([^)]*)\)|(\S+)", name)]
        return [tuple(f for f in group if self.sizes.get(f) != 1) or (group[0],) for group in groups]

    def axes(self, shapes: Sequence[tuple[int, ...]], specs: Sequence[Any], mesh: Mesh | AbstractMesh) -> Axes:
        """Returns the mesh axes of each factor, given shapes and PartitionSpecs of inputs and results."""
        arrays = list(zip(self.dims(self.inputs) + self.dims(self.results), shapes, specs, strict=True))
        found: dict[str, tuple[str, ...]] = {}
        for dims, shape, spec in sorted(arrays, key=lambda array: -math.prod(array[1])):
            for factors, size, entry in zip(dims, shape, spec, strict=False):
                used = {axis for axes in found.values() for axis in axes}
                axes = tuple(axis for axis in mesh_axes(entry) if axis not in used)
                factor = factors[0]
                allowed = factor in self.sharded | self.reduced and factor not in found
                whole = self.sizes.get(factor, size) % math.prod(mesh.shape[axis] for axis in axes) == 0
                if axes and allowed and whole:
                    found[factor] = axes
        return found | {factor: found[other] for factor, other in self.follows.items() if other in found}

    def shardy(self) -> SdyShardingRule:
        """Returns the rule in the form that Shardy takes."""

        def mappings(names: Any) -> tuple[ArrayMapping, ...]:
            return tuple(
                ArrayMapping(*(dim[0] if len(dim) == 1 else CompoundFactor(*dim) for dim in dims))
                for dims in self.dims(names)
            )

        dims = [dim for array in self.dims((self.inputs, self.results)) for dim in array]
        alone = {dim[0] for dim in dims if len(dim) == 1}
        used = dict.fromkeys(factor for dim in dims for factor in dim)
        sizes: Any = {factor: self.sizes[factor] for factor in used if factor not in alone}
        known = self.sharded | self.reduced | self.follows.keys()
        return SdyShardingRule(
            mappings(self.inputs),
            mappings(self.results),
            reduction_factors=tuple(factor for factor in used if factor in self.reduced),
            need_replication_factors=tuple(factor for factor in used if factor not in known),
            **sizes,
        )


Run: TypeAlias = Callable[[Any], Any]
"""Runs the call with its inputs, all of them on one device."""

RunShare: TypeAlias = Callable[[Any, Share], Any]
"""Runs one device's share of a call with its shares of the inputs."""


def run_sharded(make_rule: Callable[[Any], ShardingRule | None], inputs: Any, run: Run, run_share: RunShare) -> Any:
    """Runs a call on arrays that may be sharded; on one device it just runs.

    Args:
      make_rule: returns how the call can be sharded, given the inputs; None leaves that to JAX.
      inputs: the inputs, a pytree of arrays.
      run: runs the whole call.
      run_share: runs a device's share.
    """
    with _mesh_of(inputs):
        placement = _explicit_placement(inputs) or _concrete_placement(inputs)
        if placement is None and not _may_be_sharded(inputs):
            return run(inputs)
        rule = make_rule(inputs)
        return run(inputs) if rule is None else _run_by_rule(rule, placement, inputs, run, run_share)


def _run_by_rule(rule: ShardingRule, placement: Placement | None, inputs: Any, run: Run, run_share: RunShare) -> Any:
    """Runs a call on arrays that are sharded as their placement says, or as XLA decides where there is none."""
    leaves, structure = jax.tree.flatten(inputs)

    def whole(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(run(jax.tree.unflatten(structure, arrays)))

    def part(share: Share, *shares: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(run_share(jax.tree.unflatten(structure, shares), share))

    def sharded(*arrays: jax.Array) -> list[jax.Array]:
        if placement is not None:
            return _run_in_shard_map(rule, arrays, placement, part)
        return _run_partitioned(rule, arrays, whole, part)

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        return sharded(*arrays)

    @call.def_vmap
    def _(axis_size: int, in_batched: Sequence[bool], *arrays: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        del axis_size
        in_axes = [0 if batched else None for batched in in_batched]
        outputs = run_sharded(
            lambda _: rule.mapped(in_batched),
            arrays,
            lambda arrays: jax.vmap(whole, in_axes)(*arrays),
            lambda shares, share: jax.vmap(functools.partial(part, share), in_axes)(*shares),
        )
        return outputs, [True] * len(outputs)

    # Reverse mode does not pass through custom_vmap.
    outputs = with_derivatives_of(whole if placement is None else sharded, call)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(rule.results), outputs)


def unpartitionable() -> str | None:
    """Returns why no kernel can run on the current mesh, or None; without a current mesh nothing is known."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    auto = [name for name in auto if mesh.shape[name] > 1]
    if target_platform() != "tpu" or not auto:
        return None
    return f"XLA partitions no kernels over Auto axes of TPUs, here {', '.join(auto)}; {WAYS_OUT}"


def _specs(names: list[Dims], axes: Axes) -> list[PartitionSpec]:
    """Returns the PartitionSpec of each array."""
    return [PartitionSpec(*(axes.get(factors[0]) for factors in dims)) for dims in names]


def _share(rule: ShardingRule, sharded: Axes, mesh: Mesh | AbstractMesh) -> Share:
    several = {factor: tuple(axis for axis in over if mesh.shape[axis] > 1) for factor, over in sharded.items()}
    axes = {factor: over for factor, over in several.items() if over}
    shards = {factor: math.prod(mesh.shape[axis] for axis in over) for factor, over in axes.items()}
    return Share(axes, shards, tuple(axis for factor in rule.reduced for axis in axes.get(factor, ())))


def _mesh_of(inputs: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes the mesh that the types of arrays name the current one, if there is none."""
    current = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(inputs)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or not current.empty:
        return contextlib.nullcontext()
    device = current.abstract_device or mesh.abstract_device
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device)
    )


def _explicit_placement(inputs: Any) -> Placement | None:
    """Returns how arrays are sharded over a mesh with Explicit axes, by their types, or None."""
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(inputs)]
    mesh = next((one.mesh for one in shardings if AxisType.Explicit in one.mesh.axis_types), None)
    if mesh is None:
        return None
    explicit = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    return Placement(mesh, explicit - mapped_mesh_axes(), [one.spec for one in shardings])


def _concrete_placement(inputs: Any) -> Placement | None:
    """Returns how arrays whose values are known are sharded over one mesh of several devices, or None."""
    leaves = jax.tree.leaves(inputs)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    shardings = [leaf.sharding for leaf in leaves]
    meshes = {one.mesh if isinstance(one, NamedSharding) else None for one in shardings if len(one.device_set) > 1}
    if len(meshes) != 1 or (mesh := meshes.pop()) is None:
        return None
    specs = [one.spec if isinstance(one, NamedSharding) else PartitionSpec() for one in shardings]
    return Placement(mesh, set(mesh.axis_names), specs)


def _may_be_sharded(inputs: Any) -> bool:
    """Returns whether XLA may find arrays of the call sharded over several devices, and can partition the call."""
    if target_platform() == "tpu":
        return False
    leaves = jax.tree.leaves(inputs)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return any(isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 for leaf in leaves)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mesh.abstract_device is None and jax.device_count() > 1
    return mesh.size > 1 and AxisType.Manual not in mesh.axis_types


def _run_in_shard_map(
    rule: ShardingRule, arrays: Sequence[jax.Array], placement: Placement, part: Callable[..., list[jax.Array]]
) -> list[jax.Array]:
    """Runs a call on arrays of which it is known how they are sharded.

    Args:
      rule: how the call can be sharded.
      arrays: the inputs.
      placement: how they are sharded.
      part: runs a device's share, given the `Share` and the shares of the inputs.
    """
    mesh, names, results = placement.mesh, rule.dims(rule.inputs), rule.dims(rule.results)
    shapes = [array.shape for array in arrays] + [()] * len(results)
    axes = rule.axes(shapes, [*placement.specs, *[PartitionSpec()] * len(results)], mesh)
    in_specs = tuple(_specs(names, axes))
    mapped = jax.shard_map(
        functools.partial(part, _share(rule, axes, mesh)),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=_specs(results, axes),
        axis_names=placement.axes,
        check_vma=False,
    )
    if isinstance(mesh, AbstractMesh):
        arrays = [jax.reshard(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, in_specs, strict=True)]
    outputs: list[jax.Array] = jax.jit(mapped)(*arrays)
    return outputs


def _run_partitioned(
    rule: ShardingRule,
    arrays: Sequence[jax.Array],
    whole: Callable[..., list[jax.Array]],
    part: Callable[..., list[jax.Array]],
) -> list[jax.Array]:
    """Runs a call that XLA partitions by the rule.

    Args:
      rule: how the call can be sharded.
      arrays: the inputs.
      whole: runs the call on one device, given the inputs.
      part: runs a device's share, given the `Share` and the shares of the inputs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device

    def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
        described = [*arguments, *results]
        axes = rule.axes([one.shape for one in described], [one.sharding.spec for one in described], mesh)
        share = _share(rule, axes, mesh)

        def run_one(*shares: jax.Array) -> list[jax.Array]:
            # XLA calls this while it compiles: what the call was traced for must be said again.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
                return part(share, *shares)

        def shardings(names: Any) -> list[NamedSharding]:
            return [NamedSharding(mesh, spec) for spec in _specs(rule.dims(names), axes)]

        return mesh, run_one, shardings(rule.results), tuple(shardings(rule.inputs))

    partitioned = custom_partitioning(jax.jit(whole))  # jit keeps constants, which custom_partitioning refuses
    partitioned.def_partition(partition, sharding_rule=rule.shardy())
    outputs: list[jax.Array] = jax.jit(partitioned)(*arrays)
    return outputs
