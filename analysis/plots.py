"""The figures that the evaluation report, the tracker and the notebook share: arrays in, a Figure out.

Nothing here shows, saves or touches pyplot's global state; `save` writes a PNG. Colours are safe for
colour-blind readers: Okabe-Ito for experts and series, viridis for maps. Shapes: E experts, C classes, G
superclasses, T epochs, M pictures of H x W pixels.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, ORANGE, GREEN, VERMILLION = OKABE_ITO[:4]
BEST_BY = ("macro_f1/validation", "accuracy/validation", "loss/validation")
EXPERT_AXIS = "expert · hidden units"

Names = Sequence[str]
Chosen = Sequence[tuple[str, float]]  # expert labels and gate weights of one sample


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the figure as a PNG of 150 dpi, whole or not at all, and make its folder. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def training_curves(history: Sequence[dict], best_by: str | None = None) -> Figure:
    """Losses on the left, scores on the right, the best epoch (of equals the last) marked.

    history: a dict per epoch, of "epoch" and keys such as "loss/train" or "accuracy/validation" (0 to 1);
    missing and non-finite values leave gaps, other keys are ignored. best_by: the key that decides the best
    epoch; left out, the first that was recorded of macro-F1, accuracy and loss on validation.
    """
    epoch_T = [row.get("epoch", index + 1) for index, row in enumerate(history)]
    curves = {}
    for key in sorted({key for row in history for key in row if re.search("(loss|accuracy|f1).*/", key)}):
        curve_T = np.array([row.get(key) for row in history], dtype=float)
        curve_T[~np.isfinite(curve_T)] = np.nan
        if not np.isnan(curve_T).all():
            curves[key] = curve_T
    best_by = best_by or next((key for key in BEST_BY if key in curves), None)
    pick = np.nanmin if "loss" in str(best_by) else np.nanmax
    best = int(np.flatnonzero(curves[best_by] == pick(curves[best_by]))[-1]) if best_by in curves else None
    figure = _figure(3.5, "Training")
    for ax, kind in zip(figure.subplots(1, 2), ("loss", "score"), strict=True):
        panel = {key: curve_T for key, curve_T in curves.items() if ("loss" in key) == (kind == "loss")}
        _curves(ax, kind, epoch_T, panel)
        if best is not None:
            ax.axvline(epoch_T[best], color="0.4", linewidth=1, linestyle=":")
        if best_by in panel:
            label = f"best epoch, {epoch_T[best]:g}: {panel[best_by][best]:.4g}"
            ax.plot(epoch_T[best], panel[best_by][best], "k*", markersize=9, label=label)
        if panel:
            ax.legend(fontsize=7.5)
    return figure


def load_over_time(epochs: ArrayLike, load_TE: ArrayLike, expert_labels: Names, warmup_epochs: float = 0.0) -> Figure:
    """Validation load of each expert by epoch; of more than 16 experts the last epoch's first 8 are coloured.

    epochs: (T,), ascending. load_TE: fractions of the assignments. The first `warmup_epochs` epochs, routed
    at random, are shaded; the even share 1/E is dashed.
    """
    epoch_T, load_TE = np.asarray(epochs, dtype=float), np.asarray(load_TE, dtype=float)
    num_experts = len(expert_labels)
    figure = _figure(4.0, "Expert load on the validation images")
    ax = figure.subplots()
    dots = "." if len(epoch_T) < 20 else None
    for rank, expert in enumerate(np.argsort(-load_TE[-1], kind="stable") if len(epoch_T) else []):
        place = expert if num_experts <= 16 else rank
        style = {"color": OKABE_ITO[place % 8], "linestyle": "-" if place < 8 else "-.", "zorder": 3}
        label = _label(expert_labels[expert])
        if num_experts > 16 and rank >= 8:
            style = {"color": "0.75", "linewidth": 0.7}
            label = f"{num_experts - 8} other experts" if rank == 8 else None
        ax.plot(epoch_T, load_TE[:, expert], marker=dots, label=label, **style)
    ax.axhline(1 / num_experts, color="0.2", ls="--", lw=1, label=f"even share, 1/{num_experts}", zorder=4)
    if warmup_epochs > 0:
        ax.axvspan(min([0.0, *epoch_T]), warmup_epochs, color="0.9", label="random warm-up")
    ax.set(xlabel="epoch", ylabel="share of the assignments", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="experts, by last load", title_fontsize=8)
    return figure


def expert_load(load_E: ArrayLike, importance_E: ArrayLike, expert_labels: Names) -> Figure:
    """Bars of each expert's share of the assignments and of the gate weight, the most loaded on top."""
    load_E, importance_E = np.asarray(load_E, dtype=float), np.asarray(importance_E, dtype=float)
    num_experts = len(load_E)
    order_E = np.argsort(-load_E, kind="stable")
    row, size = (np.interp(num_experts, (8, 16, 64), sizes) for sizes in ((0.42, 0.3, 0.19), (8, 7.5, 5.5)))
    figure = _figure(max(2.4, 1.4 + row * num_experts), "Expert load and importance")
    ax = figure.subplots()
    rows = np.arange(num_experts)
    stroke = [withStroke(linewidth=2, foreground="white")]
    series = ((-0.2, load_E, BLUE, "load"), (0.2, importance_E, ORANGE, "importance"))
    for offset, share_E, colour, name in series:
        bars = ax.barh(rows + offset, share_E[order_E], height=0.4, color=colour, label=name)
        ax.bar_label(bars, fmt="{:.1%}", padding=2, fontsize=size, path_effects=stroke)
    ax.axvline(1 / num_experts, color="0.2", ls="--", lw=1, label=f"even share, 1/{num_experts}", zorder=0)
    # Room on the right for the printed values.
    ax.set_xlim(0, 1.15 * max(load_E.max(), importance_E.max(), 1 / num_experts))
    ax.set_ylim(num_experts - 0.5, -0.5)
    ax.set_yticks(rows, [_label(expert_labels[expert]) for expert in order_E], fontsize=size)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set(xlabel="share of the assignments (load), of the gate weight (importance)", ylabel=EXPERT_AXIS)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def expert_by_class(
    share_CE: ArrayLike,
    class_names: Names,
    expert_labels: Names,
    group_C: ArrayLike | None = None,
    group_names: Names | None = None,
) -> Figure:
    """Heat map of each class's spread over the experts: experts as rows, classes as columns.

    share_CE: rows that sum to 1; a row of zeros (no assignment) is grey. group_C, group_names: each class's
    superclass and the superclasses' names, to order and separate by; without them the classes are ordered by
    dominant expert. Up to 200 classes are named, in panels of about 50; more are ranks on one panel.
    """
    share_CE = np.asarray(share_CE, dtype=float)
    num_classes, num_experts = share_CE.shape
    group_C = np.zeros(num_classes, int) if group_names is None else np.asarray(group_C)
    order_C = np.lexsort((-share_CE.max(1), share_CE.argmax(1), group_C))
    named = num_classes <= 200
    panels = np.array_split(order_C, -(-num_classes // 50) if named else 1)
    widest = len(panels[0])
    cell = (7.9 - 0.06 * max(len(_label(label)) for label in expert_labels)) / widest
    names = np.array([_label(name, 24) for name in class_names])
    size = float(np.clip(60 * cell, 5, 7.5))
    longest = max(map(len, names)) * 0.6 * size / 72
    map_height = float(np.clip(0.24 * num_experts, 1.3, 3.2))
    label_height = (longest if named else 0.2) + (0.2 if group_names is None else 0.65)
    figure = _figure(len(panels) * (map_height + label_height) + 0.8, "Which expert serves which class", 9.0)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    norm = Normalize(0, max(share_CE.max(), 1e-9))
    for ax, columns in zip(axes, panels, strict=True):
        table = np.where(share_CE[columns].sum(1) > 0, share_CE[columns].T, np.nan)
        image = _map(ax, table, norm, values=widest <= 12 and num_experts <= 16)
        _ticks(ax.yaxis, expert_labels, map_height, 7)
        if named:
            turn = 90 if longest > cell else 0
            ax.set_xticks(range(len(columns)), names[columns], fontsize=size, rotation=turn)
        if group_names is not None:
            _group_names(ax, group_C[columns], group_names, cell)
        # Cells of one width in all panels, the last one too.
        ax.set_xlim(-0.5, widest - 0.5)
    order = "by dominant expert" if group_names is None else "by superclass"
    axes[-1].set_xlabel(f"class, {order}" if named else f"rank of the class, {order}")
    figure.supylabel(EXPERT_AXIS, fontsize=9)
    bar = figure.colorbar(image, ax=axes, aspect=40, pad=0.01, format=PercentFormatter(1.0))
    bar.set_label("share of assignments", fontsize=8)
    return figure


def superclass_confusion(confusion_GG: ArrayLike, names: Names) -> Figure:
    """Confusion map, rows (true) divided by their sum; colours on a square-root scale, for the small errors.

    confusion_GG: counts, true by predicted; a row without samples is grey. Up to 25 names get printed values.
    """
    confusion_GG = np.asarray(confusion_GG, dtype=float)
    total_G = confusion_GG.sum(1, keepdims=True)
    rate_GG = np.divide(confusion_GG, total_G, out=np.full_like(confusion_GG, np.nan), where=total_G > 0)
    figure = _figure(7.4, "Confusion of the superclasses")
    ax = figure.subplots()
    image = _map(ax, rate_GG, PowerNorm(0.5, 0, 1), values=len(names) <= 25)
    _ticks(ax.yaxis, names, 5.0)
    _ticks(ax.xaxis, names, 5.0)
    ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=ax, aspect=40, format=PercentFormatter(1.0), label="share of the row")
    return figure


def samples(images_MHWC: np.ndarray, true_names: Names, predicted_names: Names, experts: Sequence[Chosen]) -> Figure:
    """Pictures with true class (above), prediction (below: ✓ right, ✗ wrong) and bars of the gate weights.

    images_MHWC: uint8, one or three channels. experts: each picture's (expert label, gate weight), heaviest
    first, of which four are drawn; an empty list is a dropped sample.
    """
    columns = min(5, max(1, len(images_MHWC)))
    rows = max(1, -(-len(images_MHWC) // columns))
    bars = min(4, max([1, *map(len, experts)]))
    scale = max([1.0, *(weight for chosen in experts for _, weight in chosen)])
    figure = _figure(rows * (1.9 + 0.2 * bars) + 0.6, "Test samples: true class, prediction, gate weights")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.4, 0.2 * bars] * rows)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for index, image in enumerate(images_MHWC):
        ax, below = grid[index // columns * 2 :, index % columns][:2]
        pixels = "nearest" if max(image.shape[:2]) < 100 else "antialiased"
        ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation=pixels)
        ax.set_title(_label(true_names[index], 22), fontsize=8)
        mark, colour = ("✓", BLUE) if true_names[index] == predicted_names[index] else ("✗", VERMILLION)
        ax.set_xlabel(f"{mark} {_label(predicted_names[index], 20)}", fontsize=8, color=colour)
        _gate_bars(below, experts[index][:bars], bars, scale)
    return figure


def _gate_bars(ax: Axes, chosen: Chosen, bars: int, scale: float) -> None:
    ax.set(xlim=(0, scale), ylim=(bars - 0.5, -0.5))
    for row, (label, weight) in enumerate(chosen):
        number = re.match(r"\d+", label)
        colour = OKABE_ITO[int(number[0]) % 8] if number else BLUE
        ax.barh(row, weight, height=0.9, color=colour, alpha=0.45)
        ax.text(0.02 * scale, row, _label(label, 20), fontsize=6.5, va="center")
        ax.text(scale, row, f"{weight:.2f}", fontsize=6.5, va="center", ha="right")
    if not chosen:
        ax.text(0, 0, "no expert (dropped)", fontsize=6.5, va="center")


def _curves(ax: Axes, kind: str, epochs: Sequence[float], curves: dict[str, np.ndarray]) -> None:
    metrics = sorted({key.split("/")[0] for key in curves})
    colours = {"train": BLUE, "validation": ORANGE, "test": GREEN}
    dots = "." if len(epochs) < 20 else None
    for key, curve_T in curves.items():
        metric, split = key.split("/", 1)
        line = ("-", "--", ":", "-.")[metrics.index(metric) % 4]
        label = _label(f"{metric.replace('_f1', '-F1').replace('_', ' ')}, {split}")
        ax.plot(epochs, curve_T, line, color=colours.get(split, "0.5"), marker=dots, label=label)
    ax.set(xlabel="epoch", ylabel="loss (nats)" if kind == "loss" else "score (0 to 1)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.grid(alpha=0.3)
    if not curves:
        ax.text(0.5, 0.5, f"no {kind} recorded", transform=ax.transAxes, ha="center", color="0.4")
    elif kind == "loss" and 0 < 30 * np.nanmin(list(curves.values())) < np.nanmax(list(curves.values())):
        ax.set_yscale("log")


def _group_names(ax: Axes, group_K: np.ndarray, names: Names, cell: float) -> None:
    """Separators between superclasses and, above, their names, wrapped to the width of their columns."""
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(group_K)) + 1), len(group_K)]):
        if start:
            ax.axvline(start - 0.5, color="white", linewidth=1.5)
        letters = int((stop - start) * cell * 72 / 3.45)
        if letters >= 5:
            text = textwrap.fill(
                _label(names[group_K[start]].replace("_", " "), 60), letters, max_lines=3, placeholder="…"
            )
            where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            ax.text((start + stop - 1) / 2, 1.02, text, fontsize=5.7, **where)


def _map(ax: Axes, table: np.ndarray, norm: Normalize, values: bool) -> matplotlib.image.AxesImage:
    """Heat map, grey where nothing is known; `values` prints the percentages that do not round to 0."""
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    image = ax.imshow(table, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(table) if values else ():
        if value > 0.005:
            colour = "black" if norm(value) > 0.6 else "white"
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _ticks(axis: matplotlib.axis.Axis, labels: Names, inches: float, largest: float = 8) -> None:
    """Name as many of the rows or columns as fit without overlap."""
    size = float(np.clip(60 * inches / len(labels), 5.5, largest))
    step = max(1, int(-(-len(labels) * size * 1.15 // (72 * inches))))
    axis.set_ticks(range(0, len(labels), step), [_label(label) for label in labels[::step]], fontsize=size)


def _figure(height: float, title: str, width: float = 8.0) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    return figure


def _label(text: str, length: int = 30) -> str:
    """Shortened, on one line, and with no $ that matplotlib would set as mathematics."""
    text = " ".join(str(text).split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
