"""The compiler still makes of the kernels what the figures in benchmarks/results say.

After an intended change, this command updates the figures:

    python -m palladion.benchmarks.static tpu --figures=benchmarks/results/static_tpu.jsonl
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from static_pages import static_page

from palladion.benchmarks.static import Examiner, WorkloadName, figures, workloads
from palladion.benchmarks.static.tpu import compiler as tpu_compiler
from palladion.benchmarks.static.tpu.table import TABLE
from palladion.kernels.devices import tpu_chips

RESULTS: Final = Path(__file__).parents[1] / "benchmarks" / "results" / "static_tpu.jsonl"

SLACK: Final = 1.05
"""Factor by which a kernel may become slower before it counts as a regression."""

HELD: Final = {
    ("decode_attention", "llama-3-8b"): tuple(tpu_chips()),
    ("decode_attention", "llama-3-8b-int8"): ("v5p", "v7x"),
    ("decode_attention", "32x8x64-int8-8x4096"): ("v6e",),
    ("decode_attention", "32x8x256-int8-8x4096"): ("v5e",),
    ("decode_attention", "llama-3-8b-paged"): ("v5e", "v7x"),
    ("append_kv", "llama-3-8b"): tuple(tpu_chips()),
    ("quantized_matmul", "llama-3-8b-qkv-1-int8"): tuple(tpu_chips()),
    ("quantized_matmul", "llama-3-8b-output-1-int4-g32"): ("v5e", "v6e"),
}
"""Cases that are compiled again, and for which generations; all cases would take a quarter of an hour."""

examiner = Examiner()


@pytest.fixture(scope="module", autouse=True)
def one_process_for_all() -> Iterator[None]:
    with examiner:
        yield


@functools.cache
def kept() -> tuple[dict[str, str], dict[figures.Place, list[dict[str, Any]]]]:
    return figures.read(RESULTS)


def test_figures_are_of_cases_that_exist_and_of_every_chip():
    _, found = kept()
    names = {name for name, _ in found}
    assert set(found) == {(name, chip) for name in names for chip in tpu_chips()}
    assert names <= {f"{one}/{name}" for one in workloads.operations("tpu") for name in workloads.named_cases(one)}


@pytest.mark.parametrize("operation", figures.operations(RESULTS))
def test_the_page_has_these_figures(operation: str):
    for table in figures.tables(RESULTS, operation):
        assert table in static_page(operation), table


def test_new_figures_replace_those_on_the_page(tmp_path: Path):
    """A page is written with the first figures; later ones replace its tables and nothing else."""
    path, page = tmp_path / "figures.jsonl", tmp_path / "append_kv_static.md"

    def take(name: str, microseconds: float) -> None:
        entry = {"kernel": "k", "microseconds": microseconds, "roofline": 0.5}
        entries = [entry | {"workload": f"append_kv/{name}", "chip": chip} for chip in tpu_chips()]
        figures.write(path, {"libtpu": "1"}, entries, pages=tmp_path)

    take("llama-3-8b", 1.0)
    page.write_text(page.read_text() + "\nMore to say.\n")
    take("llama-3-8b", 2.0)
    take("one-token", 3.0)
    text = page.read_text()
    assert all(table in text for table in figures.tables(path, "append_kv"))
    assert "| `llama-3-8b` | 2, 50% |" in text
    assert "| 1, 50% |" not in text
    assert "| `one-token` | 3, 50% |" in text
    assert text.count("More to say.") == 1


@pytest.mark.skipif(not tpu_compiler.installed(), reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("operation", "name", "chip"), [(*case, chip) for case, chips in HELD.items() for chip in chips]
)
def test_nothing_has_become_slower(operation: str, name: str, chip: str):
    versions, found = kept()
    if importlib.metadata.version("libtpu") != versions["libtpu"]:
        pytest.skip(f"figures are of libtpu {versions['libtpu']}")
    row = examiner.examine(WorkloadName(operation, name), chip)
    before = found[str(row.workload), chip]
    now = TABLE.figures([row])
    assert len(now) == len(before)
    for one, old in zip(now, before, strict=True):
        assert "failure" not in one, one
        assert one["bytes_moved"] <= old["bytes_moved"], (one, old)
        assert one["microseconds"] <= SLACK * old["microseconds"], (one, old)


def test_figures_of_other_workloads_stay(tmp_path: Path):
    path = tmp_path / "figures.jsonl"
    one, again, other = (
        {"workload": f"append_kv/{name}", "chip": "v6e", "kernel": name, "microseconds": time, "roofline": 0.5}
        for name, time in (("a", 1.0), ("a", 2.0), ("b", 3.0))
    )
    figures.write(path, {"libtpu": "1"}, [one])
    figures.write(path, {"libtpu": "1"}, [other])
    figures.write(path, {"libtpu": "1"}, [again])
    assert figures.read(path) == (
        {"libtpu": "1"},
        {("append_kv/a", "v6e"): [again], ("append_kv/b", "v6e"): [other]},
    )
    assert figures.markdown(path, "append_kv", ["b", "a"]).splitlines()[2:] == ["| `b` | 3, 50% |", "| `a` | 2, 50% |"]
    of_gpus = [one | {"backend": backend} for backend in ("mosaic_gpu", "triton")]
    figures.write(path, {"libtpu": "1"}, of_gpus)
    figures.write(path, {"libtpu": "1"}, [of_gpus[0] | {"kernel": "new"}])
    assert figures.read(path)[1]["append_kv/a", "v6e"] == [again, of_gpus[0] | {"kernel": "new"}, of_gpus[1]]
    figures.write(path, {"libtpu": "2"}, [other])
    assert set(figures.read(path)[1]) == {("append_kv/b", "v6e")}
