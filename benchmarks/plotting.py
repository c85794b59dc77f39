"""Parts that pictures share: optional matplotlib, font sizes, and names of points that do not overlap."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

DOTS_PER_INCH: Final = 110

FONTS: Final = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
"""Settings of matplotlib for all pictures."""

LEGEND_LINES: Final = 40
"""Lines of a column of a legend beside a picture."""

PLACES: Final = tuple(
    (round(distance * right), round(distance * up))
    for distance in (9, 17, 25, 34)
    for right, up in ((1, 0), (0.7, 0.8), (0.7, -0.8), (-1, 0), (0, 1), (0, -1), (-0.7, 0.8), (-0.7, -0.8))
)
"""Where the middle of a point's name may be, in points (1/72 inch) from it; the first free place is taken."""


def require_matplotlib(what: str = "a picture") -> None:
    """Checks that matplotlib is installed.

    Args:
      what: what needs it, for the message.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{what} needs matplotlib: pip install 'palladion[bench]', or pip install matplotlib")


def name_points(axes: Any, points: Sequence[tuple[float, float, str]], fontsize: int = 8) -> list[Any]:
    """Writes a name beside each point, where it covers neither a point nor another name, as long as there is room.

    The limits and scales of the axes must be final.

    Args:
      axes: matplotlib's axes.
      points: coordinates and names.
      fontsize: size of the names.

    Returns:
      The texts.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # places are known once the picture is laid out
    scale = figure.dpi / 72
    marks = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    half_height = 0.62 * fontsize * scale
    radius = 4 * scale
    taken: list[tuple[float, float, float]] = []

    def is_free(x: float, y: float, half_width: float) -> bool:
        names = all(
            abs(x - other) >= half_width + other_half or abs(y - place) >= 2 * half_height
            for other, place, other_half in taken
        )
        return names and all(abs(x - a) >= half_width + radius or abs(y - b) >= half_height + radius for a, b in marks)

    texts = []
    for (px, py), (x, y, name) in zip(marks, points, strict=True):
        half_width = 0.34 * fontsize * len(name) * scale
        free = (one for one in PLACES if is_free(px + one[0] * scale, py + one[1] * scale, half_width))
        right, up = next(free, PLACES[0])
        taken.append((px + right * scale, py + up * scale, half_width))
        far = max(abs(right), abs(up)) > 12
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 3} if far else None
        texts.append(
            axes.annotate(
                name,
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                fontsize=fontsize,
                ha="center",
                va="center",
                arrowprops=line,
            )
        )
    return texts


def label_decades(axis: Any, format_number: Any = "{:,g}".format) -> None:
    """Labels 1, 2 and 5 in each decade of a logarithmic axis.

    Args:
      axis: matplotlib's axis.
      format_number: formats a number of the axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_formatter(NullFormatter())


def legend_columns(lines: int) -> int:
    """Returns the number of columns of a legend beside a picture."""
    return -(-max(lines, 1) // LEGEND_LINES)


def save(figure: Any, path: Path) -> None:
    """Writes a picture; the same figures give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
