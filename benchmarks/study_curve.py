"""The study's figure: mixtures against a dense head of equal cost, by width."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from analysis.plots.style import OKABE_ITO, new_figure, save
from benchmarks.study_heads import FAMILIES, family_and_width

STYLES = dict(zip(FAMILIES, (("black", "o"), *zip(OKABE_ITO, "s^D", strict=False)), strict=True))


def draw_curve(rows: list[dict[str, Any]], preferred: Collection[str], path: Path) -> Path:
    """Test macro-F1, and the paired difference to the dense head with its 95 % interval, over the active units.

    rows: from `study_tables.rows`, with the methods of `width_methods`. preferred: methods whose difference is marked
    with a ring. Returns the path.
    """
    families: dict[str, dict[int, dict]] = {family: {} for family in FAMILIES}
    for row in rows:
        family, width = family_and_width(row["method"])
        families[family][width] = row
    seeds = min(row["seeds"] for row in rows)
    figure = new_figure(7, f"Mixtures against a dense head of equal active FLOPs, {seeds} seeds")
    scores, differences = figure.subplots(2, 1, sharex=True)
    for index, (family, (color, marker)) in enumerate(STYLES.items()):
        style = {"color": color, "marker": marker, "markersize": 4, "capsize": 2, "label": family}
        found = sorted(families[family].items())
        spread = [100 * (row["macro_f1_deviation"] or 0) for _, row in found]
        if found:
            scores.errorbar([width for width, _ in found], [100 * row["macro_f1"] for _, row in found], spread, **style)
        if family != "dense":
            _difference(differences, found, 1.06 ** (index - 2), preferred, style)
    scores.set_ylabel("test macro-F1 (%), mean ± deviation")
    scores.legend(fontsize=8)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set_ylabel("paired difference to dense\n(points, 95 % interval)")
    differences.set_xlabel(
        "hidden units of the dense head (logarithmic); rings: the mixture with the best validation score"
    )
    differences.set_xscale("log", base=2)
    every = sorted({width for family in families.values() for width in family})
    differences.set_xticks(every, [str(width) for width in every])
    for axes in (scores, differences):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def _difference(axes, found: list[tuple[int, dict]], shift: float, preferred: Collection[str], style: dict) -> None:
    """Differences with their intervals, shifted slightly so that the bars of the families do not overlap."""
    paired = [(shift * width, row["method"], *row["paired"]) for width, row in found if "paired" in row]
    if not paired:
        return
    below = [100 * (0 if low is None else mean - low) for _, _, mean, low, _ in paired]
    above = [100 * (0 if high is None else high - mean) for _, _, mean, _, high in paired]
    axes.errorbar([x for x, *_ in paired], [100 * mean for _, _, mean, *_ in paired], [below, above], **style)
    for x, method, mean, *_ in paired:
        if method in preferred:
            axes.scatter([x], [100 * mean], s=90, facecolors="none", edgecolors=style["color"], zorder=3)
