"""Figures of the training: losses, scores, expert load."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from analysis.plots.style import BLUE, GREEN, OKABE_ITO, ORANGE, PINK, Names, new_figure, short

BEST_BY = ("macro_f1/validation", "accuracy/validation", "loss/validation")
CURVE_COLOURS = {"macro_f1/validation": GREEN, "train": BLUE, "validation": ORANGE, "test": PINK}


def training_curves(history: Sequence[dict], best_by: str | None = None, kept: int | None = None) -> Figure:
    """Losses on the left, scores on the right; the kept epoch, or else the best one (the last in a tie), is marked.

    history: a dict per epoch, of "epoch" and keys such as "loss/train" or "accuracy/validation" (0 to 1);
    missing and non-finite values leave gaps, other keys are ignored. best_by: the key that determines the
    best epoch, and whose curve has the star; default: the first recorded one of validation macro-F1, accuracy and loss.
    kept: the epoch whose weights were kept, if known.
    """
    epoch_T = [row.get("epoch", index + 1) for index, row in enumerate(history)]
    curves = {}
    # The auxiliary losses have different units and floors, and would stretch the axis.
    shown = {key for row in history for key in row if re.match("(loss|accuracy|macro_f1)/", key)}
    for key in sorted(shown):
        curve_T = np.array([row.get(key) for row in history], dtype=float)
        curve_T[~np.isfinite(curve_T)] = np.nan
        if not np.isnan(curve_T).all():
            curves[key] = curve_T
    best_by = best_by or next((key for key in BEST_BY if key in curves), None)
    starred, what = None, "best epoch"
    if kept is not None and kept in epoch_T:
        starred, what = epoch_T.index(kept), "kept epoch"
    elif best_by is not None and best_by in curves:
        pick = np.nanmin if "loss" in best_by else np.nanmax
        starred = int(np.flatnonzero(curves[best_by] == pick(curves[best_by]))[-1])
    figure = new_figure(3.5, "Training")
    for ax, kind in zip(figure.subplots(1, 2), ("loss", "score"), strict=True):
        panel = {key: curve_T for key, curve_T in curves.items() if ("loss" in key) == (kind == "loss")}
        _curves(ax, kind, epoch_T, panel)
        if starred is not None:
            ax.axvline(epoch_T[starred], color="0.4", linewidth=1, linestyle=":")
        if starred is not None and best_by in panel:
            label = f"{what}, {epoch_T[starred]:g}: {panel[best_by][starred]:.4g}"
            ax.plot(epoch_T[starred], panel[best_by][starred], "k*", markersize=9, label=label)
        if panel:
            ax.legend(fontsize=7.5)
    return figure


def load_over_time(epochs: ArrayLike, load_TE: ArrayLike, expert_labels: Names, warmup_epochs: float = 0.0) -> Figure:
    """Validation load of each expert by epoch; with more than 16 experts, the 8 largest of the last epoch are coloured.

    epochs: (T,), ascending. load_TE: fractions of the assignments by the learned gate. The first `warmup_epochs`
    epochs, when training routed at random and the gate learned nothing, are shaded; the even share 1/E is dashed.
    """
    epoch_T, load_TE = np.asarray(epochs, dtype=float), np.asarray(load_TE, dtype=float)
    num_experts = len(expert_labels)
    figure = new_figure(4.0, "Expert load on the validation images")
    ax = figure.subplots()
    dots = "." if len(epoch_T) < 20 else None
    for rank, expert in enumerate(np.argsort(-load_TE[-1], kind="stable") if len(epoch_T) else []):
        place = expert if num_experts <= 16 else rank
        style = {"color": OKABE_ITO[place % 8], "linestyle": "-" if place < 8 else "-.", "zorder": 3}
        label = short(expert_labels[expert])
        if num_experts > 16 and rank >= 8:
            style = {"color": "0.75", "linewidth": 0.7}
            label = f"{num_experts - 8} other experts" if rank == 8 else None
        ax.plot(epoch_T, load_TE[:, expert], marker=dots, label=label, **style)
    ax.axhline(1 / num_experts, color="0.2", ls="--", lw=1, label=f"even share, 1/{num_experts}", zorder=4)
    start = min([0.0, *epoch_T])
    if warmup_epochs > 0:
        ax.axvspan(
            start, warmup_epochs, color="0.9", label="warm-up: training routes\nat random, the gate is\nuntrained"
        )
    highest = max([1 / num_experts, *load_TE.ravel()])
    ax.set(xlabel="epoch", ylabel="share of the assignments", ylim=(0, 1.06 * highest))
    ax.set_xlim(start, max([1.0, warmup_epochs, *epoch_T]) * 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="experts, by last load", title_fontsize=8)
    return figure


def _curves(ax: Axes, kind: str, epochs: Sequence[float], curves: dict[str, np.ndarray]) -> None:
    metrics = sorted({key.split("/")[0] for key in curves})
    dots = "." if len(epochs) < 20 else None
    for key, curve_T in curves.items():
        metric, split = key.split("/", 1)
        line = ("-", "--", ":", "-.")[metrics.index(metric) % 4]
        colour = CURVE_COLOURS.get(key, CURVE_COLOURS.get(split, "0.5"))
        label = short(f"{metric.replace('_f1', '-F1')}, {split}")
        ax.plot(epochs, curve_T, line, color=colour, marker=dots, label=label)
    ax.set(xlabel="epoch", ylabel="loss (nats)" if kind == "loss" else "score (0 to 1)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.grid(alpha=0.3)
    if not curves:
        ax.text(0.5, 0.5, f"no {kind} recorded", transform=ax.transAxes, ha="center", color="0.4")
    elif kind == "loss" and 0 < 30 * np.nanmin(list(curves.values())) < np.nanmax(list(curves.values())):
        ax.set(yscale="log", ylabel="loss (nats, logarithmic)")
