"""Figure that compares several runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from analysis.plots.style import BLUE, GREEN, ORANGE, Names, name_ticks, new_figure, short

LABELLED = 8  # largest number of runs with room for the numbers


def comparison(names: Names, panels: Mapping[str, Mapping[str, ArrayLike]], from_zero: Names = ()) -> Figure:
    """One row per run, one panel per kind of score, one dot per value; the runs keep their order.

    With few runs the values are printed next to the dots; if the axis starts at 0, a line connects each dot with it.
    names: of the R runs. panels: axis label -> {series: values_R}, nan for a missing value; at most three series per
    panel. from_zero: the labels of the panels whose axis starts at 0.
    """
    labelled = len(names) <= LABELLED
    height = float(np.clip((0.45 if labelled else 0.26) * len(names), 0.6, 14.0))
    longest = max((len(short(name, 40)) for name in names), default=0)
    figure = new_figure(
        height + 1.5, f"Comparison of {len(names)} runs", 0.5 + 2.3 * max(1, len(panels)) + 0.055 * longest
    )
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    rows = np.arange(len(names))
    for ax, (label, series) in zip(axes, panels.items(), strict=False):
        styles = zip(series.items(), "osD", (BLUE, ORANGE, GREEN), ("full", "none", "none"), strict=False)
        for place, ((name, values), marker, colour, fill) in enumerate(styles):
            values_R = np.asarray(values, dtype=float)
            if label in from_zero:
                ax.hlines(rows, 0, values_R, color=colour, lw=3, alpha=0.35)
            if labelled:
                _print_values(ax, values_R, colour, below=place > 0)
            ax.plot(
                values_R,
                rows,
                marker,
                color=colour,
                fillstyle=fill,
                mew=1.5,
                ms=5,
                label=short(name),
                clip_on=False,
                zorder=3,
            )
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(labelsize=7.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.margins(x=0.2 if labelled else 0.1)
        if label in from_zero:
            largest = max(np.nanmax(np.append(values_R, 1e-9)) for values_R in series.values())
            ax.set_xlim(0, (1.2 if labelled else 1.08) * largest)
        ax.grid(alpha=0.3)
        if len(series) > 1:
            ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    name_ticks(axes[0].yaxis, [short(name, 40) for name in names], height)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _print_values(ax: Axes, values_R: np.ndarray, colour: str, below: bool) -> None:
    """Each value above its dot, or below it if another series occupies the place above."""
    for row, value in enumerate(values_R):
        if np.isfinite(value):
            offset, side = ((0, -5), "top") if below else ((0, 5), "bottom")
            ax.annotate(
                f"{value:.4g}",
                (value, row),
                offset,
                textcoords="offset points",
                ha="center",
                va=side,
                fontsize=7,
                color=colour,
            )
