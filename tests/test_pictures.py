"""Pictures name their operation and their points, and no name covers another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from measurements import LIMITS, measurement

from palladion.benchmarks import plotting
from palladion.benchmarks.measure import plots
from palladion.kernels.quantized_matmul import cases

pytest.importorskip("matplotlib")

CROWD = [(1 + 0.002 * n, 1 + 0.003 * (n * 7 % 5), f"{n}") for n in range(12)]
"""Points within a few pixels of each other."""


def texts_of(figure: Any) -> list[str]:
    """Returns all that is written in a picture."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_names_of_near_points_do_not_overlap():
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0.5, 2), ylim=(0.5, 2), xscale="log", yscale="log")
    axes.scatter(*zip(*[point[:2] for point in CROWD], strict=True))
    texts = plotting.name_points(axes, CROWD)
    assert [text.get_text() for text in texts] == [name for *_, name in CROWD]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in texts]  # without the lines to the points
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("draw", [plots.bandwidth, lambda *given: plots.roofline(given[0], LIMITS, *given[1:])])
def test_pictures_of_measurements_name_operation_contenders_and_workloads(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
    names = [case.name for case in cases.MODELS[:3]]
    rows = [
        measurement(contender, (0.1 + 0.01 * n, 0.1), workload=name)
        for n, name in enumerate(names)
        for contender in ("xla", "torch")
    ]
    draw(rows, "device", tmp_path / "picture.png")
    written = texts_of(drawn[0])
    for name in ("decode_attention on device", "xla", "torch", *names):
        assert any(name in text for text in written), name
