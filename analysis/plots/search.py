"""The trials of a search: their training curves, and the score against each option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

from analysis.plots.style import BLUE, ORANGE, Names, new_figure, short

ROW = 3  # panels per row


def search(
    scores: Sequence[float | None],
    curves: Sequence[Sequence[float]],
    options: Mapping[str, Sequence[Any]],
    logarithmic: Names = (),
) -> Figure:
    """Validation macro-F1 of N trials by epoch, and of the completed ones against each option.

    scores: 0 to 1, None for a pruned or failed trial. curves: by epoch. options: name -> the value of each trial.
    logarithmic: the options with a logarithmic axis. The best trial is orange with a star; pruned trials are grey.
    """
    known = [score for score in scores if score is not None]
    best = scores.index(max(known)) if known else None
    rows = -(-(1 + len(options)) // ROW)
    figure = new_figure(0.5 + 2.7 * rows, f"{len(scores)} trials, {len(known)} completed", 10.0)
    axes = figure.subplots(rows, ROW, squeeze=False).ravel()
    for trial, curve in enumerate(curves):
        colour = ORANGE if trial == best else "0.75" if scores[trial] is None else BLUE
        style = {"zorder": 3, "lw": 2} if trial == best else {"lw": 1, "alpha": 0.7}
        axes[0].plot(range(1, len(curve) + 1), 100 * np.asarray(curve), color=colour, marker=".", ms=3, **style)
    axes[0].set_xlabel("epoch", fontsize=8)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax, (name, values) in zip(axes[1:], options.items(), strict=False):
        _against(ax, name, values, scores, best)
        if name in logarithmic:
            _logarithmic(ax, name, [value for value, score in zip(values, scores, strict=True) if score is not None])
    for ax in axes[: 1 + len(options)]:
        ax.tick_params(labelsize=6 if any(len(label.get_text()) > 12 for label in ax.get_xticklabels()) else 7)
        ax.grid(alpha=0.3)
    for row in range(rows):
        axes[row * ROW].set_ylabel("validation macro-F1 (%)", fontsize=8)
    for ax in axes[1 + len(options) :]:
        ax.set_axis_off()
    return figure


def _against(ax: Axes, name: str, values: Sequence[Any], scores: Sequence[float | None], best: int | None) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    texts = sorted({str(value) for value in values}) if not numbers else []
    whole = [trial for trial, score in enumerate(scores) if score is not None]
    x = [values[trial] if numbers else texts.index(str(values[trial])) for trial in whole]
    ax.scatter(x, [100 * (scores[trial] or 0.0) for trial in whole], s=18, color=BLUE, alpha=0.7)
    if best is not None:
        place = values[best] if numbers else texts.index(str(values[best]))
        ax.scatter([place], [100 * (scores[best] or 0.0)], s=110, color=ORANGE, marker="*", zorder=3)
    if texts:
        ax.set_xticks(range(len(texts)), [_staggered(*item) for item in enumerate(texts)])
        ax.set_xlim(-0.5, len(texts) - 0.5)
    elif all(isinstance(value, int) for value in values):
        few = sorted({int(value) for value in x})
        ax.xaxis.set_major_locator(FixedLocator(few) if len(few) <= 6 else MaxNLocator(integer=True))
    ax.set_xlabel(name, fontsize=8)


def _logarithmic(ax: Axes, name: str, values: Sequence[float]) -> None:
    """A logarithmic axis with at least two ticks, also for values within one decade."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"{name} (log scale)", fontsize=8)
    if values and max(values) < 100 * min(values):
        low, high = min(values), max(values)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for power in powers for digit in (1, 2, 5) if low <= (tick := digit * 10.0**power) <= high]
        ticks = ticks if len(ticks) > 1 else sorted({low, high})
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])


def _staggered(place: int, text: str) -> str:
    """A label; every second one is one line lower."""
    return "\n" * (place % 2) + short(text.replace(", ", ","), 24)
