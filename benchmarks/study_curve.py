"""The study's figure: what a mixture is worth against a dense head of equal cost, over the width."""

from pathlib import Path
from typing import Any

from analysis.plots.style import OKABE_ITO, new_figure, save


def draw_curve(rows: list[dict[str, Any]], path: Path) -> Path:
    """Test macro-F1, and the paired difference to the dense head with its 95 % interval, over the active units.

    rows: of `study_tables.rows`, whose method is a family and a width such as `dense 64`. Returns the path.
    """
    families: dict[str, dict[int, dict]] = {}
    for row in rows:
        family, _, width = row["method"].rpartition(" ")
        families.setdefault(family, {})[int(width)] = row
    seeds = min(row["seeds"] for row in rows)
    figure = new_figure(7, f"Mixtures against a dense head of equal active FLOPs, {seeds} seeds")
    scores, differences = figure.subplots(2, 1, sharex=True)
    marks = {"dense": "o"} | dict(zip((name for name in families if name != "dense"), "s^Dv", strict=False))
    for index, (family, mark) in enumerate(marks.items()):
        widths = sorted(families.get(family, {}))
        found = [families[family][width] for width in widths]
        look = {"color": "black" if family == "dense" else OKABE_ITO[index - 1], "marker": mark, "markersize": 4}
        spread = [100 * (row["macro_f1_deviation"] or 0) for row in found]
        scores.errorbar(widths, [100 * row["macro_f1"] for row in found], spread, capsize=2, label=family, **look)
        if family == "dense":
            continue
        paired = [
            (width, *(100 * (row["paired"][0] if v is None else v) for v in row["paired"]))
            for width, row in zip(widths, found, strict=True)
            if "paired" in row
        ]
        shifted = [width * 1.06 ** (index - 2) for width, *_ in paired]  # side by side, or the bars would overlap
        middle = [mean for _, mean, _, _ in paired]
        ends = [[mean - low for _, mean, low, _ in paired], [high - mean for _, mean, _, high in paired]]
        differences.errorbar(shifted, middle, ends, capsize=2, label=family, **look)
    scores.set_ylabel("test macro-F1 (%), mean ± deviation")
    scores.legend(fontsize=8)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set_ylabel("paired difference to dense\n(points, 95 % interval)")
    differences.set_xlabel("active hidden units, gate included")
    differences.set_xscale("log", base=2)
    every = sorted({width for family in families.values() for width in family})
    differences.set_xticks(every, [str(width) for width in every])
    for axes in (scores, differences):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
