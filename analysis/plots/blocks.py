"""Experts inside a ViT's blocks: load by block and over time, and the contribution of each expert in each block."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from analysis.plots.style import EXPERT_AXIS, Names, expert_colour, heat_map, name_ticks, new_figure, short

PRINTED = 16  # largest number of experts with room for numbers


def block_load(load_LE: ArrayLike, importance_LE: ArrayLike, block_names: Names, expert_labels: Names) -> Figure:
    """Heat map of the load of each block's experts: blocks as rows; the importance in brackets if there is room.

    load_LE, importance_LE: shares of the assignments and of the gate weight, rows that sum to 1.
    """
    load_LE, importance_LE = np.asarray(load_LE, dtype=float), np.asarray(importance_LE, dtype=float)
    num_experts = load_LE.shape[1]
    printed = num_experts <= PRINTED
    title = "Expert load in each block" + printed * "\n(in brackets: share of the gate weight)"
    figure, ax, height = _table_page(title, block_names, expert_labels, printed)
    image = heat_map(ax, load_LE, Normalize(0, max(load_LE.max(), 2 / num_experts)), printed, importance_LE)
    name_ticks(ax.yaxis, block_names, height)
    bar = figure.colorbar(image, ax=ax, aspect=30, pad=0.01, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the assignments", fontsize=8)
    bar.ax.axhline(1 / num_experts, color="white", lw=1.5)
    bar.ax.text(-0.3, 1 / num_experts, "even", fontsize=7, ha="right", va="center")
    return figure


def block_load_over_time(
    epochs: ArrayLike, load_TLE: ArrayLike, block_names: Names, expert_labels: Names, warmup_epochs: float = 0.0
) -> Figure:
    """A small panel for each block: load of each expert by epoch; the even share is dashed, the warm-up shaded.

    epochs: (T,), ascending. load_TLE: fractions of the block's assignments by the learned gate.
    """
    epoch_T, load_TLE = np.asarray(epochs, dtype=float), np.asarray(load_TLE, dtype=float)
    num_blocks, num_experts = load_TLE.shape[1:]
    columns = min(4, num_blocks)
    rows = -(-num_blocks // columns)
    figure = new_figure(1.75 * rows + 1.1, "Expert load in each block during training", 9.0)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[num_blocks:]:
        ax.set_visible(False)
    for ax, load_TE, name in zip(axes.flat, load_TLE.transpose(1, 0, 2), block_names, strict=False):
        for expert, load_T in enumerate(load_TE.T):
            style = {"color": expert_colour(expert), "linestyle": "-" if expert < 8 else "-."}
            label = f"expert {short(expert_labels[expert], 24)}"
            ax.plot(epoch_T, load_T, marker="." if len(epoch_T) < 20 else None, lw=1.3, label=label, **style)
        ax.axhline(1 / num_experts, color="0.2", ls="--", lw=0.8, zorder=1)
        if warmup_epochs > 0:
            ax.axvspan(0, warmup_epochs, color="0.9", zorder=0)
        ax.set_title(short(name, 24), fontsize=8, pad=3)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=7)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlim(0, max([1.0, warmup_epochs, *epoch_T]) * 1.02)
    ax.set_ylim(0, 1.06 * max([1 / num_experts, *load_TLE.ravel()]))
    for ax in axes[-1, : num_blocks - columns * (rows - 1)]:
        ax.set_xlabel("epoch" + (" (shaded: warm-up)" if warmup_epochs > 0 else ""), fontsize=8)
    figure.supylabel("share of the block's assignments", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[:16], labels[:16], loc="outside lower center", ncols=min(4, num_experts), fontsize=8)
    return figure


def block_worth(
    lost_LE: ArrayLike,
    lost_E: ArrayLike,
    deviation_LE: ArrayLike,
    deviation_E: ArrayLike,
    block_names: Names,
    expert_labels: Names,
) -> Figure:
    """Heat map of the macro-F1 lost without an expert in one block, and, in the last row, in all blocks.

    lost_LE, lost_E: macro-F1 (0 to 1), above 0 for a useful expert; nan if not measured. deviation_LE, deviation_E:
    standard deviations; cells within one of them are white, with grey numbers.
    """
    lost = 100 * np.vstack([np.asarray(lost_LE, dtype=float), np.asarray(lost_E, dtype=float)])
    deviation = 100 * np.vstack([np.asarray(deviation_LE, dtype=float), np.asarray(deviation_E, dtype=float)])
    rows = [*block_names, "all blocks"]
    printed = lost.shape[1] <= PRINTED
    figure, ax, height = _table_page("Contribution of each expert", rows, expert_labels, printed)
    limit = float(np.nanmax(np.where(np.abs(lost) > deviation, np.abs(lost), 0.0), initial=0.1))
    norm = TwoSlopeNorm(0, -limit, limit)
    coloured = np.where(np.abs(lost) > deviation, lost, 0 * lost)  # nan stays nan
    image = ax.imshow(np.ma.masked_invalid(coloured), norm=norm, cmap="PuOr_r", aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.85")
    for (row, column), value in np.ndenumerate(lost) if printed else ():
        if np.isfinite(value):
            certain = abs(value) > deviation[row, column]
            colour = "0.45" if not certain else "white" if abs(value) > 0.7 * limit else "black"
            weight = "bold" if certain else "normal"
            text = f"{round(value, 2) + 0.0:.2f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour, weight=weight)
    ax.axhline(len(block_names) - 0.5, color="black", lw=1.5)
    name_ticks(ax.yaxis, rows, height)
    bar = figure.colorbar(image, ax=ax, aspect=30, pad=0.01)
    bar.set_label("macro-F1 lost without it, points", fontsize=8)
    return figure


def _table_page(title: str, rows: Names, expert_labels: Names, printed: bool) -> tuple[Figure, Axes, float]:
    """A page for a map of blocks by experts, its axes with expert names, and the map's height in inches."""
    height = max(1.0, (0.34 if printed else 0.2) * len(rows))
    width = float(np.clip(2.4 + 0.9 * len(expert_labels), 5.0, 9.0))
    figure = new_figure(height + 1.1, title, width)
    ax = figure.subplots()
    name_ticks(ax.xaxis, expert_labels, width - 2.4)
    ax.set_xlabel(EXPERT_AXIS)
    return figure, ax, height
