"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from analysis.plots.style import BLUE, GREEN, ORANGE, Names, name_ticks, new_figure, short


def comparison(names: Names, panels: Mapping[str, Mapping[str, ArrayLike]], from_zero: Names = ()) -> Figure:
    """A row for each run, a panel for each kind of figure, a dot for each value; the runs keep their order.

    names: of the R runs. panels: axis label -> {series: values_R}, nan where a run has none; at most three
    series a panel. from_zero: the labels of the panels whose axis begins at 0.
    """
    height = float(np.clip(0.26 * len(names), 0.9, 14.0))
    longest = max((len(short(name, 40)) for name in names), default=0)
    figure = new_figure(height + 1.5, f"Comparison of {len(names)} runs", 3.0 + 2.1 * len(panels) + 0.055 * longest)
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    rows = np.arange(len(names))
    for ax, (label, series) in zip(axes, panels.items(), strict=False):
        styles = zip(series.items(), "osD", (BLUE, ORANGE, GREEN), ("full", "none", "none"), strict=False)
        for (name, values_R), marker, colour, fill in styles:
            ax.plot(
                np.asarray(values_R, dtype=float),
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
        ax.margins(x=0.1)
        if label in from_zero:
            largest = max(np.nanmax(np.append(values_R, 1e-9)) for values_R in series.values())
            ax.set_xlim(0, 1.08 * largest)
        ax.grid(alpha=0.3)
        if len(series) > 1:
            ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    name_ticks(axes[0].yaxis, [short(name, 40) for name in names], height)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure
