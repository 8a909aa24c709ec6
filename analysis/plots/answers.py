"""Figures of the model's predictions: samples, confusions, reliability."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from analysis.arrays import ratio
from analysis.plots.style import (
    BLUE,
    ORANGE,
    SKY,
    VERMILLION,
    Names,
    expert_colour,
    heat_map,
    name_ticks,
    new_figure,
    short,
)

RARE = 10  # bins with fewer samples are unreliable
Chosen = Sequence[tuple[str, float]]  # expert labels and gate weights of one sample


def superclass_confusion(confusion_GG: ArrayLike, names: Names) -> Figure:
    """Confusion matrix with rows (true classes) divided by their sum; colours on a square-root scale to show small
    errors.

    confusion_GG: counts, true by predicted; a row without samples is grey, a cell without them blank. Up to 25 names
    get printed values.
    """
    confusion_GG = np.asarray(confusion_GG, dtype=float)
    rate_GG = ratio(confusion_GG, confusion_GG.sum(1, keepdims=True), np.nan)
    figure = new_figure(7.4, "Confusion of the superclasses")
    ax = figure.subplots()
    blank_GG = np.where(rate_GG == 0, -1, rate_GG)  # below the scale, shown white
    image = heat_map(ax, blank_GG, PowerNorm(0.5, 0, 1), values=len(names) <= 25)
    name_ticks(ax.yaxis, names, 5.0)
    name_ticks(ax.xaxis, names, 5.0)
    ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=ax, aspect=40, format=PercentFormatter(1.0, decimals=0), label="share of the row")
    return figure


def confused_pairs(pairs: Sequence[tuple[str, str, int, int]], errors: int) -> Figure:
    """Bars of the most confused pairs of classes, the worst on top.

    pairs: (name a, name b, images of a predicted as b, images of b predicted as a), in drawing order. errors: the
    total number of misclassified images, for the title.
    """
    drawn = sum(there + back for _, _, there, back in pairs)
    most = f"{len(pairs)} most confused pairs" if len(pairs) > 1 else "most confused pair"
    title = f"The {most} of classes: {drawn} of {errors} {'errors' if errors > 1 else 'error'}"
    figure = new_figure(max(2.2, 1.3 + 0.2 * len(pairs)), title if pairs else "No two classes are confused")
    ax = figure.subplots()
    rows = np.arange(len(pairs))
    there, back = (np.array([pair[place] for pair in pairs], dtype=int) for place in (2, 3))
    ax.barh(rows, there, color=BLUE, label="the first predicted as the second")
    ax.barh(rows, back, left=there, color=ORANGE, label="the second predicted as the first")
    for row, total in enumerate(there + back):
        ax.text(total, row, f" {total}", va="center", fontsize=7)
    ax.set_yticks(rows, [f"{short(a, 22)} – {short(b, 22)}" for a, b, _, _ in pairs], fontsize=7.5)
    ax.set_ylim(max(len(pairs), 1) - 0.4, -0.6)
    ax.set_xlim(0, 1.08 * max([1, *(there + back)]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="test images")
    if pairs:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def reliability(confidence_B: ArrayLike, accuracy_B: ArrayLike, count_B: ArrayLike, error: float) -> Figure:
    """Accuracy against confidence in B equal bins of [0, 1] (top), and the number of samples in each bin (bottom).

    confidence_B, accuracy_B: the means over a bin's samples, nan if it is empty. error: the expected calibration
    error, for the title.
    """
    confidence_B, accuracy_B = np.asarray(confidence_B, dtype=float), np.asarray(accuracy_B, dtype=float)
    count_B = np.asarray(count_B, dtype=float)
    bins = len(count_B)
    left_B, width = np.arange(bins) / bins, 1 / bins
    figure = new_figure(5.5, f"Reliability: expected calibration error {100 * error:.1f} %", 5.5)
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    filled_B = count_B > 0
    rare_B = filled_B & (count_B < RARE)
    bars = {"width": width, "align": "edge", "edgecolor": "white"}
    often_B = filled_B & ~rare_B
    above.bar(left_B[often_B], accuracy_B[often_B], color=SKY, label="accuracy", **bars)
    if rare_B.any():
        label = f"fewer than {RARE} images"
        above.bar(left_B[rare_B], accuracy_B[rare_B], color=SKY, alpha=0.35, hatch="///", label=label, **bars)
    above.plot([0, 1], [0, 1], color="black", ls="--", lw=1, label="perfectly calibrated")
    above.plot(
        confidence_B[filled_B],
        accuracy_B[filled_B],
        "o",
        color=VERMILLION,
        ms=4,
        clip_on=False,
        zorder=3,
        label="at the bin's mean confidence",
    )
    above.set(ylabel="accuracy of the bin", xlim=(0, 1), ylim=(0, 1))
    below.bar(left_B, count_B / max(1.0, count_B.sum()), width, align="edge", color="0.6", edgecolor="white")
    below.set(xlabel="confidence: probability of the predicted class", ylabel="share of\nthe samples")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    for axis in (above.xaxis, above.yaxis, below.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for ax in (above, below):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure


def samples(images_MHWC: np.ndarray, true_names: Names, predicted_names: Names, experts: Sequence[Chosen]) -> Figure:
    """Images with true class (above), prediction (below: ✓ correct, ✗ wrong) and bars of the gate weights.

    images_MHWC: uint8, one or three channels. experts: each image's (expert label, gate weight), sorted by decreasing
    weight; the first four are drawn. An empty list is a dropped sample.
    """
    columns = min(5, max(1, len(images_MHWC)))
    rows = max(1, -(-len(images_MHWC) // columns))
    bars = min(4, max([1, *map(len, experts)]))
    scale = max([1.0, *(weight for chosen in experts for _, weight in chosen)])
    figure = new_figure(
        rows * (1.9 + 0.2 * bars) + 0.6, "Test samples: true class, prediction, experts and their gate weights"
    )
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.4, 0.2 * bars] * rows)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for index, image in enumerate(images_MHWC):
        ax, below = grid[index // columns * 2 :, index % columns][:2]
        pixels = "nearest" if max(image.shape[:2]) < 100 else "antialiased"
        ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation=pixels)
        ax.set_title(short(true_names[index], 22), fontsize=8)
        mark, colour = ("✓", BLUE) if true_names[index] == predicted_names[index] else ("✗", VERMILLION)
        ax.set_xlabel(f"{mark} {short(predicted_names[index], 20)}", fontsize=8, color=colour)
        _gate_bars(below, experts[index][:bars], bars, scale)
    return figure


def _gate_bars(ax: Axes, chosen: Chosen, bars: int, scale: float) -> None:
    ax.set(xlim=(0, scale), ylim=(bars - 0.5, -0.5))
    for row, (label, weight) in enumerate(chosen):
        number = re.match(r"\d+", label)
        colour = expert_colour(int(number[0])) if number else BLUE
        ax.barh(row, weight, height=0.9, color=colour, alpha=0.45)
        ax.text(0.02 * scale, row, short(label, 20), fontsize=6.5, va="center")
        ax.text(scale, row, f"{weight:.2f}", fontsize=6.5, va="center", ha="right")
    if not chosen:
        ax.text(0, 0, "no expert (dropped)", fontsize=6.5, va="center")
