"""Figures of the experts: load, classes, contribution, and the gate's input."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, NullLocator, PercentFormatter
from numpy.typing import ArrayLike

from analysis.gate import Plane
from analysis.plots.style import (
    BLUE,
    EXPERT_AXIS,
    ORANGE,
    Names,
    expert_colour,
    heat_map,
    name_ticks,
    new_figure,
    short,
)

STROKE = [withStroke(linewidth=2, foreground="white")]


def expert_load(
    load_E: ArrayLike, importance_E: ArrayLike, expert_labels: Names, images: str = "the test images"
) -> Figure:
    """Bars of each expert's share of the assignments and of the gate weight, the highest load on top.

    images: the name of the images, for the title.
    """
    load_E, importance_E = np.asarray(load_E, dtype=float), np.asarray(importance_E, dtype=float)
    num_experts = len(load_E)
    order_E = np.argsort(-load_E, kind="stable")
    row, size = (np.interp(num_experts, (8, 16, 64), sizes) for sizes in ((0.42, 0.3, 0.19), (8, 7.5, 5.5)))
    figure = new_figure(max(2.4, 1.4 + row * num_experts), f"Expert load and importance on {images}")
    ax = figure.subplots()
    rows = np.arange(num_experts)
    series = ((-0.2, load_E, BLUE, "load"), (0.2, importance_E, ORANGE, "importance"))
    for offset, share_E, colour, name in series:
        bars = ax.barh(rows + offset, share_E[order_E], height=0.4, color=colour, label=name)
        ax.bar_label(bars, fmt="{:.1%}", padding=2, fontsize=size, path_effects=STROKE)
    ax.axvline(1 / num_experts, color="0.2", ls="--", lw=1, label=f"even share, 1/{num_experts}", zorder=0)
    # Leave room on the right for the printed values.
    ax.set_xlim(0, 1.15 * max(load_E.max(), importance_E.max(), 1 / num_experts))
    ax.set_ylim(num_experts - 0.5, -0.5)
    ax.set_yticks(rows, [short(expert_labels[expert]) for expert in order_E], fontsize=size)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlabel="share of the assignments (load), of the gate weight (importance)", ylabel=EXPERT_AXIS)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def expert_by_class(
    weight_CE: ArrayLike,
    class_names: Names,
    expert_labels: Names,
    group_C: ArrayLike | None = None,
    group_names: Names | None = None,
    load_CE: ArrayLike | None = None,
    title: str = "Which expert processes which class",
) -> Figure:
    """Heat map of each class's distribution over the experts: experts as rows, classes as columns, colour: gate weight.

    weight_CE: shares of the gate weight, rows that sum to 1; a row of zeros (no assignment) is grey. load_CE: shares of
    the assignments, printed in brackets below those of the weight if there is room for numbers. group_C, group_names:
    each class's superclass and the superclasses' names, for ordering and separators; without them the classes are
    ordered by the expert with the largest weight. Up to 200 classes are named, in panels of about 50; more are shown as
    ranks on one panel.
    """
    weight_CE = np.asarray(weight_CE, dtype=float)
    num_classes, num_experts = weight_CE.shape
    group_C = np.zeros(num_classes, int) if group_names is None else np.asarray(group_C)
    order_C = np.lexsort((-weight_CE.max(1), weight_CE.argmax(1), group_C))
    named = num_classes <= 200
    panels = np.array_split(order_C, -(-num_classes // 50) if named else 1)
    widest = len(panels[0])
    cell = (7.9 - 0.06 * max(len(short(label)) for label in expert_labels)) / widest
    names = np.array([short(name, 24) for name in class_names])
    size = float(np.clip(60 * cell, 5, 7.5))
    longest = max(map(len, names)) * 0.6 * size / 72
    printed = widest <= 12 and num_experts <= 16
    map_height = 0.36 * num_experts if printed else float(np.clip(0.24 * num_experts, 1.3, 3.2))
    label_height = (longest if named else 0.2) + (0.2 if group_names is None else 0.65)
    if printed and load_CE is not None:
        title += "\n(in brackets: share of the assignments)"
    figure = new_figure(len(panels) * (map_height + label_height) + 0.8, title, 9.0)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    norm = Normalize(0, max(weight_CE.max(), 1e-9))
    for ax, columns in zip(axes, panels, strict=True):
        served = weight_CE[columns].sum(1) > 0
        table = np.where(served, weight_CE[columns].T, np.nan)
        image = heat_map(ax, table, norm, printed, None if load_CE is None else np.asarray(load_CE)[columns].T)
        name_ticks(ax.yaxis, expert_labels, map_height, 7)
        if named:
            turn = 90 if longest > cell else 0
            ax.set_xticks(range(len(columns)), names[columns], fontsize=size, rotation=turn)
        if group_names is not None:
            _group_names(ax, group_C[columns], group_names, cell)
        # Cells of the same width in all panels, including the last one.
        ax.set_xlim(-0.5, widest - 0.5)
    order = "by the expert with the largest weight" if group_names is None else "by superclass"
    axes[-1].set_xlabel(f"class, {order}" if named else f"rank of the class, {order}")
    figure.supylabel(EXPERT_AXIS, fontsize=9)
    bar = figure.colorbar(image, ax=axes, aspect=40, pad=0.01, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the gate weight", fontsize=8)
    return figure


def expert_worth(
    lost_E: ArrayLike, deviation_E: ArrayLike, parameters_E: ArrayLike, load_E: ArrayLike, expert_labels: Names
) -> Figure:
    """Contribution of each expert against its cost, as numbered bubbles whose area is the expert's load.

    lost_E: macro-F1 (0 to 1) lost when the expert is removed and its samples go to the next choice, with its standard
    deviation. parameters_E: of each expert; experts of equal size are drawn side by side.
    """
    lost_E, deviation_E, load_E = (100 * np.asarray(values, dtype=float) for values in (lost_E, deviation_E, load_E))
    parameters_E = np.asarray(parameters_E, dtype=float)
    x_E = _side_by_side(parameters_E, lost_E)
    crowding = min(1.0, 12 / len(lost_E))
    figure = new_figure(4.0, "Value and cost of each expert")
    ax = figure.subplots()
    ax.axhline(0, color="0.4", lw=1)
    ax.errorbar(x_E, lost_E, deviation_E, fmt="none", ecolor="0.5", elinewidth=1, capsize=3)
    # The largest first, so that no small bubble is hidden.
    for expert in np.argsort(-load_E, kind="stable"):
        label = f"{short(expert_labels[expert], 26)}: {round(float(lost_E[expert]), 2) + 0.0:+.2f}"
        at = (float(x_E[expert]), float(lost_E[expert]))
        area = 90 * crowding + 14 * load_E[expert]
        ax.scatter(*at, area, color=expert_colour(expert), edgecolor="white", zorder=3, label=label)
        ax.text(*at, str(expert), ha="center", va="center", fontsize=5 + 2 * crowding, zorder=4, path_effects=STROKE)
    ax.set_xscale("log")
    ax.margins(x=0.12, y=0.15)
    ticks = []
    for value in np.unique(parameters_E):
        if not ticks or value > 1.2 * ticks[-1]:  # closer ones would overlap
            ticks.append(value)
    ax.set_xticks(ticks, [EngFormatter(places=0 if value < 1000 else 1, sep=" ")(value) for value in ticks], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)
    ax.set(xlabel="parameters of the expert (logarithmic)", ylabel="macro-F1 lost without it (points)")
    handles, labels = ax.get_legend_handles_labels()
    value = np.argsort(-lost_E[np.argsort(-load_E, kind="stable")], kind="stable")[:16]
    legend = figure.legend([handles[i] for i in value], [labels[i] for i in value], loc="outside right upper")
    most = f", the first {len(value)}" if len(value) < len(labels) else ""
    legend.set_title(f"points lost without it{most}\n(area: load; bars: ± 1 s.d.)", FontProperties(size=8))
    for text in legend.get_texts():
        text.set_fontsize(7.5)
    handle: Any
    for handle in legend.legend_handles:
        handle.set_sizes([45])
    return figure


def gate_map(
    plane: Plane, expert_N: ArrayLike, expert_labels: Names, group_N: ArrayLike | None = None, group_names: Names = ()
) -> Figure:
    """Samples on the plane that separates the experts best, coloured by the expert with their largest weight.

    expert_N: -1 for a sample without an expert (grey, as are those of all but the 8 busiest experts). group_N,
    group_names: classes or superclasses; each name is written at the median of its samples.
    """
    points_N2, expert_N = np.asarray(plane.points_N2, dtype=float), np.asarray(expert_N)
    num_experts = len(expert_labels)
    figure = new_figure(5.8, "The gate's input, by expert")
    ax = figure.subplots()
    counts_E = np.bincount(expert_N[expert_N >= 0], minlength=num_experts)
    busiest = [expert for expert in np.argsort(-counts_E, kind="stable")[:8] if counts_E[expert]]
    others = ~np.isin(expert_N, busiest)
    size = float(np.interp(len(points_N2), (300, 1500), (20, 9)))
    if others.any():
        ax.scatter(*points_N2[others].T, s=size, color="0.75", label=f"none or another ({others.sum()})", linewidths=0)
    for rank, expert in enumerate(busiest):
        colour = expert_colour(expert if num_experts <= 8 else rank)
        label = f"{short(expert_labels[expert])} ({counts_E[expert]})"
        ax.scatter(*points_N2[expert_N == expert].T, s=size, color=colour, alpha=0.6, label=label, linewidths=0)
    of_N = np.asarray(() if group_N is None else group_N)
    medians = {
        name: np.median(points_N2[of_N == group], axis=0)
        for group, name in enumerate(group_names)
        if (of_N == group).any()
    }
    for name, place in _spread(medians, np.maximum(np.ptp(points_N2, axis=0), 1e-9) / (5.7, 4.9)).items():
        weight = "bold" if len(short(name)) < 3 else "normal"
        x, y = place.tolist()
        ax.text(x, y, short(name, 36), fontsize=7, weight=weight, ha="center", va="center", path_effects=STROKE)
    ax.set(xticks=[], yticks=[])
    first, second = (f"{100 * share:.0f} % of the variance between experts" for share in plane.explained_2)
    nearest, chance = (f"{100 * share:.0f} %" for share in (plane.accuracy, plane.chance))
    nearest = f"the nearest centre is that of the image's expert for {nearest} (always the largest: {chance})"
    ax.set_xlabel(f"first discriminant axis: {first}\n{nearest}", fontsize=9)
    ax.set_ylabel(f"second discriminant axis: {second}", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, title="main expert (images)", title_fontsize=8)
    return figure


def _side_by_side(cost_E: np.ndarray, value_E: np.ndarray) -> np.ndarray:
    """Positions on a logarithmic axis, with experts of equal cost side by side, sorted by contribution."""
    place_E = cost_E.copy()
    for cost in np.unique(cost_E):
        equal = np.flatnonzero(cost_E == cost)
        rank = np.argsort(np.argsort(-value_E[equal], kind="stable"))
        step = min(0.04, 0.3 / len(equal))
        place_E[equal] *= 10 ** (step * (rank - (len(equal) - 1) / 2))
    return place_E


def _spread(places: dict[str, np.ndarray], inch_2: np.ndarray) -> dict[str, np.ndarray]:
    """Positions for names in 7-point type without overlap, moved up or down as little as possible.

    inch_2: data units of an inch on each axis.
    """
    height, placed = 0.125, {}
    for name, place in sorted(places.items(), key=lambda item: item[1][1]):
        half = 0.029 * len(short(name, 36))
        for step in sorted(range(-12, 13), key=abs):
            moved = np.array([place[0], place[1] + step * height * inch_2[1]])
            gaps = {other: np.abs(moved - at) / inch_2 for other, at in placed.items()}
            if all(x > half + 0.029 * len(short(other, 36)) or y > 0.99 * height for other, (x, y) in gaps.items()):
                break
        placed[name] = moved
    return placed


def _group_names(ax: Axes, group_K: np.ndarray, names: Names, cell: float) -> None:
    """Separators between superclasses and, above, their names, wrapped to the width of their columns."""
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(group_K)) + 1), len(group_K)]):
        if start:
            ax.axvline(start - 0.5, color="white", linewidth=1.5)
        letters = int((stop - start) * cell * 72 / 3.45)
        if letters >= 5:
            text = textwrap.fill(short(names[group_K[start]], 60), letters, max_lines=3, placeholder="…")
            where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            ax.text((start + stop - 1) / 2, 1.02, text, fontsize=5.7, **where)
