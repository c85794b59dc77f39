"""Tuning keys: the tuned block sizes of a problem serve another problem only where the two are similar."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

from palladion.kernels import tuning
from palladion.kernels.append_kv import problem as append_kv
from palladion.kernels.append_qkv import problem as append_qkv
from palladion.kernels.decode_attention import problem as decode_attention
from palladion.kernels.devices import target_device_kind
from palladion.kernels.implementation import Implementation
from palladion.kernels.matmul import problem as matmul
from palladion.kernels.quantized_matmul import problem as quantized_matmul
from palladion.kernels.search_space import Space
from palladion.kernels.tuning import Entry
from palladion.reference import Scheme


@dataclasses.dataclass(frozen=True)
class Config:
    block: int


ROW = Implementation(
    "triton",
    "gpu",
    lambda _: None,
    lambda *_: None,
    Config,
    lambda _: Config(1),
    lambda _: Space(Config(1), {"block": (2,)}),
)
"""A kernel that takes any block sizes for any problem."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """How block sizes depend on the fields of a problem.

    Attributes:
      module: the module of the operation's `Problem`.
      problem: an example.
      kinds: other values of fields, each of which makes another kind of problem.
      sizes: groups of fields that may differ a little, all by the same factor.
      ignored: other values of fields that block sizes do not depend on.
    """

    module: ModuleType
    problem: Any
    kinds: tuple[dict[str, Any], ...]
    sizes: tuple[tuple[str, ...], ...]
    ignored: dict[str, Any]

    def names(self) -> set[str]:
        """Returns the names of all fields that are listed here."""
        return {name for names in (*self.kinds, *self.sizes, self.ignored) for name in names}


APPEND = append_kv.Problem(
    batch=4,
    q_len=4,
    kv_heads=4,
    head_dim=64,
    max_len=1024,
    page_size=None,
    num_pages=None,
    num_layers=None,
    x_dtype="bfloat16",
    kv_dtype="int8",
    has_new_tokens=False,
)
APPEND_KINDS: tuple[dict[str, Any], ...] = (
    {"head_dim": 128},
    {"page_size": 16},
    {"x_dtype": "float32"},
    {"kv_dtype": "float8_e4m3fn"},
    {"kv_dtype": "bfloat16"},
)
APPEND_SIZES = (("batch",), ("q_len",), ("kv_heads",), ("max_len",))
APPEND_IGNORED = {"num_pages": 99, "num_layers": 32, "has_new_tokens": True}

LINEAR: dict[str, Any] = {
    "rows": 4,
    "in_features": 1024,
    "out_features": 2048,
    "num_layers": None,
    "x_dtype": "bfloat16",
    "out_dtype": "bfloat16",
    "has_bias": False,
    "activation": None,
    "gated": False,
}
LINEAR_KINDS: tuple[dict[str, Any], ...] = (
    {"x_dtype": "float32"},
    {"out_dtype": "float32"},
    {"gated": True},
    {"order": "out_in"},
)
LINEAR_SIZES = (("rows",), ("in_features",), ("out_features",))
LINEAR_IGNORED = {
    "num_layers": 32,
    "has_bias": True,
    "activation": jax.nn.silu,
    "norm_eps": 1e-5,
    "has_residual": True,
}

OPERATIONS = {
    "decode_attention": Fields(
        decode_attention,
        decode_attention.Problem(
            batch=4,
            q_len=4,
            q_heads=16,
            kv_heads=4,
            head_dim=64,
            max_len=1024,
            page_size=None,
            num_pages=None,
            num_layers=None,
            q_dtype="bfloat16",
            kv_dtype="int8",
            scale=0.125,
            sliding_window=None,
            logits_soft_cap=None,
            has_sinks=False,
        ),
        (
            {"q_heads": 32},
            {"kv_heads": 2},
            {"head_dim": 128},
            {"page_size": 16},
            {"q_dtype": "float32"},
            {"kv_dtype": "float8_e4m3fn"},
            {"kv_dtype": "bfloat16"},
            {"sliding_window": 512},
        ),
        (("batch",), ("q_len",), ("q_heads", "kv_heads"), ("max_len",)),
        {
            "num_pages": 99,
            "num_layers": 32,
            "scale": 0.5,
            "logits_soft_cap": 30.0,
            "has_sinks": True,
            "batch_invariant": True,
        },
    ),
    "append_kv": Fields(append_kv, APPEND, APPEND_KINDS, APPEND_SIZES, APPEND_IGNORED),
    "append_qkv": Fields(
        append_qkv,
        append_qkv.Problem(APPEND, q_heads=16, rotary_dim=64),
        APPEND_KINDS,
        (*APPEND_SIZES, ("q_heads",)),
        {**APPEND_IGNORED, "rotary_dim": 32},
    ),
    "matmul": Fields(
        matmul,
        matmul.Problem(**LINEAR, w_dtype="bfloat16"),
        (*LINEAR_KINDS, {"w_dtype": "float32"}),
        LINEAR_SIZES,
        LINEAR_IGNORED,
    ),
    "quantized_matmul": Fields(
        quantized_matmul,
        quantized_matmul.Problem(**LINEAR, scheme=Scheme.parse("int8-g64"), scale_dtype="float32", quantize_x=None),
        (
            *LINEAR_KINDS,
            {"scheme": Scheme.parse("int4-g64")},
            {"scheme": Scheme.parse("int8-g128")},
            {"scheme": Scheme.parse("int8-g64-zeros")},
            {"scale_dtype": "bfloat16"},
            {"quantize_x": "int8"},
        ),
        LINEAR_SIZES,
        {**LINEAR_IGNORED, "batch_invariant": True},
    ),
}


def fields_of(problem: Any) -> set[str]:
    """Returns the names of a problem's fields, with those of its `append` problem in place of `append`."""
    names = {field.name for field in dataclasses.fields(problem)}
    return names - {"append"} | fields_of(problem.append) if "append" in names else names


def changed(problem: Any, changes: dict[str, Any]) -> Any:
    """Returns the problem with other values in some fields."""
    own = {field.name for field in dataclasses.fields(problem)}
    inner = {name: value for name, value in changes.items() if name not in own}
    outer = {name: value for name, value in changes.items() if name in own}
    if inner:
        outer["append"] = dataclasses.replace(problem.append, **inner)
    return dataclasses.replace(problem, **outer)


def value_of(problem: Any, name: str) -> Any:
    return getattr(problem, name) if hasattr(problem, name) else getattr(problem.append, name)


@pytest.fixture(params=OPERATIONS)
def tuned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fields:
    """Tunes the problem of an operation on this device, and returns its fields."""
    fields = OPERATIONS[request.param]
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    path = tuning.user_file("operation", target_device_kind())
    assert path is not None
    key = fields.problem.tuning_key()
    found = Entry(
        implementation="triton",
        kind=key.kind,
        sizes=dict(key.sizes),
        config={"block": 2},
        seconds=1e-6,
        origin="measured",
        clock="device",
        device="NVIDIA H200",
        date="2026-11-27",
    )
    tuning.save(path, [found])
    assert source(fields.problem) == "tuned"
    return fields


def source(problem: Any) -> str:
    """Returns where the block sizes of a problem come from."""
    return tuning.resolve("operation", ROW, problem, None)[1]


def test_every_field_is_listed(tuned: Fields):
    assert tuned.names() == fields_of(tuned.problem)


def test_an_entry_is_not_taken_for_another_kind(tuned: Fields):
    for changes in tuned.kinds:
        assert source(changed(tuned.problem, changes)) == "heuristic", changes


def test_an_entry_is_taken_for_similar_sizes_and_no_others(tuned: Fields):
    for names in tuned.sizes:
        for factor, expected in ((2, "nearest"), (0.5, "nearest"), (8, "heuristic"), (0.125, "heuristic")):
            values = {name: value_of(tuned.problem, name) * factor for name in names}
            if all(value >= 1 for value in values.values()):
                changes = {name: int(value) for name, value in values.items()}
                assert source(changed(tuned.problem, changes)) == expected, changes


def test_ignored_fields_do_not_change_the_key(tuned: Fields):
    for name, value in tuned.ignored.items():
        assert value != value_of(tuned.problem, name)
        other = changed(tuned.problem, {name: value})
        assert other.tuning_key() == tuned.problem.tuning_key(), name


def test_a_window_counts_by_its_visible_tokens():
    problem = changed(OPERATIONS["decode_attention"].problem, {"sliding_window": 256, "max_len": 8192})
    longer = changed(problem, {"max_len": 16384})
    wider = changed(problem, {"sliding_window": 4096})
    assert problem.tuning_key().distance(longer.tuning_key()) == 0
    assert problem.tuning_key().distance(wider.tuning_key()) > tuning.MAX_DISTANCE
