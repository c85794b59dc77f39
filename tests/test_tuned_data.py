"""The entries that the package ships: measured, with their provenance, and of use to calls."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from palladion.benchmarks.measure.model_shapes import models
from palladion.benchmarks.measure.operations import OPERATIONS
from palladion.kernels import tuning
from palladion.kernels.devices import gpus, tpu_chips
from palladion.kernels.implementation import find_implementation
from palladion.kernels.tuning import Entry

KERNELS = Path(__file__).parent.parent / "kernels"
SHIPPED = [(path, entry) for path in sorted(KERNELS.glob("*/tuned/*.json")) for entry in tuning.load(path)]
PLATFORMS = {gpu.device_kind: "gpu" for gpu in gpus().values()} | {c.device_kind: "tpu" for c in tpu_chips().values()}
SCHEMES = ("int8", "int4-g32", "int4-g128")
of_entry = pytest.mark.parametrize(
    ("path", "entry"),
    SHIPPED,
    ids=[
        f"{path.parts[-3]}-{entry.implementation}-{'-'.join(map(str, entry.sizes.values()))}" for path, entry in SHIPPED
    ],
)


def problems(operation: str, sizes: dict[str, int]) -> Iterator[Any]:
    """Yields cases of known models with these sizes."""
    for shape in models().values():
        if operation == "decode_attention":
            for kv_dtype, page_size in itertools.product((None, "int8", "float8_e4m3fn"), (None, 64)):
                yield from shape.attention_cases(sizes["batch"], sizes["seen"], kv_dtype=kv_dtype, page_size=page_size)
        elif operation == "matmul":
            yield from shape.dense_cases(sizes["rows"])
        else:
            for scheme in SCHEMES:
                cases = shape.matmul_cases(sizes["rows"], scheme)
                yield from (case for case in cases if case.in_features == sizes["in"])


@of_entry
def test_an_entry_says_where_it_comes_from(path: Path, entry: Entry):
    clocks = {"measured": ("device", "wall"), "prototype": ("device", "wall"), "estimated": ("",)}
    assert entry.clock in clocks[entry.origin]
    assert path.stem == tuning.file_stem(entry.device)
    datetime.date.fromisoformat(entry.date)
    assert {"jax", "driver"} <= entry.versions.keys() | ({"driver"} if PLATFORMS[entry.device] == "tpu" else set())
    assert 1e-6 < entry.seconds < 1e-2


@of_entry
def test_an_entry_is_that_of_a_models_problem_and_a_kernel_accepts_it(path: Path, entry: Entry):
    operation = OPERATIONS[path.parts[-3]]
    device = jax.sharding.AbstractDevice(device_kind=entry.device, num_cores=1, platform=PLATFORMS[entry.device])
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        cases = problems(operation.name, dict(entry.sizes))
        every = (operation.stored_for(case, PLATFORMS[entry.device]).problem() for case in cases)
        problem = next(one for one in every if one.tuning_key().distance(entry.key) == 0)
        row = find_implementation(operation.table, entry.implementation)
        assert row.unsupported(problem) is None
        if entry.config is None:
            assert row.space is None
        else:
            assert row.config_class is not None
            assert row.space is not None
            assert row.config_class(**entry.config) in row.space(problem)
            expected = "heuristic" if entry.heuristic else "tuned"
            assert tuning.resolve(operation.name, row, problem, None)[1] == expected


def test_a_device_has_one_entry_for_each_problem_and_implementation():
    identities = [(path, entry.implementation, entry.kind, tuple(entry.sizes.values())) for path, entry in SHIPPED]
    assert len(set(identities)) == len(identities) > 0
