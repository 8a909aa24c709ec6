"""Shared by all figures: palette, page, names, heat maps, and writing a PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.plots.fonts import Page

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, ORANGE, GREEN, VERMILLION, PINK, SKY = OKABE_ITO[:6]
EXPERT_AXIS = "expert · hidden units"

Names = Sequence[str]


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the figure as a PNG of 150 dpi, atomically, and create its folder. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def new_figure(height: float, title: str, width: float = 8.0) -> Figure:
    """A white page with this size in inches, a title, and automatic layout."""
    figure = Page(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    return figure


def short(text: object, length: int = 30) -> str:
    """The text shortened to one line, with single spaces, and without $ signs, which matplotlib would read as math."""
    line = " ".join(str(text).replace("_", " ").split())
    return (line if len(line) <= length else line[: length - 1] + "…").replace("$", r"\$")


def expert_colour(expert: int) -> str:
    """The colour of an expert in every figure."""
    return OKABE_ITO[expert % len(OKABE_ITO)]


def heat_map(
    ax: Axes, table: np.ndarray, norm: Normalize, values: bool = False, second: np.ndarray | None = None
) -> AxesImage:
    """Heat map, grey for unknown values, white below the scale.

    values: print the percentages that do not round to 0. second: another table of the same shape, whose percentages are
    printed in brackets below.
    """
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85", under="white")
    image = ax.imshow(table, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(table) if values else ():
        style: dict[str, Any] = {"ha": "center", "color": "black" if norm(value) > 0.6 else "white"}
        below = 0.0 if second is None else second[row, column]
        if value > 0.005 or below > 0.005:
            place = "center" if second is None else "bottom"
            ax.text(column, row, f"{100 * value:.0f}", va=place, fontsize=7.5, **style)
        if below > 0.005:
            ax.text(column, row + 0.05, f"({100 * below:.0f})", va="top", fontsize=6, **style)
    return image


def name_ticks(axis: Axis, labels: Names, inches: float, largest: float = 8) -> None:
    """Name as many of the rows or columns as fit without overlap."""
    size = float(np.clip(60 * inches / max(1, len(labels)), 5.5, largest))
    step = max(1, int(-(-len(labels) * size * 1.15 // (72 * inches))))
    axis.set_ticks(range(0, len(labels), step), [short(label) for label in labels[::step]], fontsize=size)
