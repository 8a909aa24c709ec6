"""The results of the study inside the ViT: tables in Markdown, and the curve over the width."""

import statistics
from itertools import permutations
from pathlib import Path
from typing import Any

from analysis.plots.style import OKABE_ITO, new_figure, save
from benchmarks.blocks_methods import DENSE, Method
from benchmarks.common import header, table
from benchmarks.study_tables import paired_interval

MEANS = ("flops", "active_parameters", "trained_parameters", "active_width")
COMPARED_WITH = ("equal", "k 1", "token", "noisy_topk")
"""The property that others are compared with, for each part of a method's name."""


def finished(store: Any) -> dict[Method, dict[int, dict]]:
    """The scored runs of each method with its best rate, by seed."""
    found = {}
    for method in store.methods:
        rate = store.best_rate(method)
        if rate is not None:
            runs = {seed: store.runs[method.label].get((rate, seed)) for seed in range(store.seeds)}
            found[method] = {seed: run for seed, run in runs.items() if run and "failed" not in run}
    return {method: by_seed for method, by_seed in found.items() if by_seed}


def rows(store: Any) -> list[dict[str, Any]]:
    """A row for each finished method: scores, costs, and the difference to the dense adapter.

    Intervals are 95 % Student's t intervals over the seeds; differences are paired by seed. seconds: the fastest of the
    method's runs, without compilation and capture, which the first runs include. edge: whether the best rate is the
    smallest or the largest that was tried.
    """
    done, found = finished(store), []
    dense = {method.width: by_seed for method, by_seed in done.items() if method.name == DENSE}
    for method, by_seed in done.items():
        f1 = {seed: run["test"]["macro_f1"] for seed, run in by_seed.items()}
        rate = store.best_rate(method)
        row: dict[str, Any] = {"method": method.name, "width": method.width, "sizes": method.sizes, "rate": rate}
        row |= {"seeds": len(f1), "macro_f1": paired_interval(list(f1.values()), [0.0] * len(f1))}
        row["validation"] = store.runs[method.label][rate, 0]["validation"]["macro_f1"]
        row["edge"] = rate in (min(store.rates), max(store.rates))
        row |= {name: statistics.fmean(run[name] for run in by_seed.values()) for name in MEANS}
        row["seconds"] = min(run["seconds"] for run in store.runs[method.label].values() if "failed" not in run)
        rival = dense.get(method.width, {})
        if method.name != DENSE and (shared := sorted(f1.keys() & rival)):
            theirs = [rival[seed]["test"]["macro_f1"] for seed in shared]
            row["paired"] = paired_interval([f1[seed] for seed in shared], theirs)
        found.append(row)
    return sorted(found, key=lambda row: (row["width"], row["method"] != DENSE, -row["macro_f1"][0]))


def contrasts(store: Any) -> list[dict[str, Any]]:
    """Differences between two methods, averaged over the widths that both have, with an interval over the seeds.

    Two methods are compared if one is the dense adapter, or if they differ in one property, of which one has the value
    in COMPARED_WITH.
    """
    by_name: dict[str, dict[int, dict[int, float]]] = {}
    for method, by_seed in finished(store).items():
        f1 = {seed: run["test"]["macro_f1"] for seed, run in by_seed.items()}
        by_name.setdefault(method.name, {})[method.width] = f1
    found = []
    for name, other in permutations(by_name, 2):
        widths = sorted(by_name[name].keys() & by_name[other])
        scores = [by_name[method][width] for method in (name, other) for width in widths]
        if not (widths and _compared(name, other) and (seeds := sorted(set.intersection(*map(set, scores))))):
            continue
        values, others = (
            [statistics.fmean(by_name[method][width][seed] for width in widths) for seed in seeds]
            for method in (name, other)
        )
        found.append({"method": name, "other": other, "widths": widths, "paired": paired_interval(values, others)})
    return sorted(found, key=lambda row: (row["other"] != DENSE, -len(row["widths"])))


def _compared(name: str, other: str) -> bool:
    if other == DENSE:
        return True
    pairs = zip(name.split(", "), other.split(", "), COMPARED_WITH, strict=False)
    differing = [theirs == reference for ours, theirs, reference in pairs if ours != theirs]
    return name != DENSE and differing == [True]


COLUMNS = ["r", "method", "experts", "learning rate", "seeds", "macro-F1 (95 %)", "paired difference (95 %)"]
COLUMNS += ["active width", "trained parameters", "active", "MFLOP per image", "seconds per run"]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table; scores in per cent, differences in points."""
    mean, low, high = row["macro_f1"]
    spread = "" if low is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    return [
        str(row["width"]),
        row["method"],
        "-".join(map(str, row["sizes"])),
        f"{row['rate']:g}",
        str(row["seeds"]),
        f"{100 * mean:.2f}{spread}",
        _difference(row.get("paired")),
        f"{row['active_width']:.1f}",
        f"{row['trained_parameters']:,.0f}",
        f"{row['active_parameters']:,.0f}",
        f"{row['flops'] / 1e6:.1f}",
        f"{row['seconds']:.1f}",
    ]


def _difference(paired: tuple[float, float | None, float | None] | None) -> str:
    if paired is None:
        return "-"
    mean, low, high = paired
    return f"{100 * mean:+.2f} " + ("(one pair)" if None in (low, high) else f"({100 * low:+.2f} to {100 * high:+.2f})")


def _list(widths: list[int]) -> str:
    return " ".join(map(str, widths))


def _without(starts: int) -> str:
    return f", without {starts} of its starts, which were killed or are still running" if starts else ""


def preferred(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each width, the mixture with the highest validation macro-F1."""
    best: dict[int, dict[str, Any]] = {}
    for row in found:
        if row["method"] != DENSE and row["validation"] > best.get(row["width"], {"validation": -1})["validation"]:
            best[row["width"]] = row
    return [best[width] for width in sorted(best)]


def show(store: Any, folder: Path) -> None:
    """Print the tables and their cost, and draw the curve."""
    found = rows(store)
    if not found:
        print("no method has finished its learning rates yet: run the same command again to continue")
        return
    setting = store.setting
    title = f"Experts from block {setting.first} on, {setting.epochs} epochs, batch {setting.batch}: test scores"
    print(header(title, store.where) if store.where else title)
    print()
    print(table(COLUMNS, [cells(row) for row in found]))
    print("\nThe mixture with the best validation score at each width, against the dense adapter of equal cost:\n")
    chosen = [[str(row["width"]), row["method"], _difference(row.get("paired"))] for row in preferred(found)]
    print(table(["r", "method", "paired difference (95 %)"], chosen))
    print("\nAveraged over the widths that both have:\n")
    pairs = [
        [row["method"], row["other"], _list(row["widths"]), _difference(row["paired"])] for row in contrasts(store)
    ]
    print(table(["method", "compared with", "r", "paired difference (95 %)"], pairs))
    runs = [run for by_run in store.runs.values() for run in by_run.values()]
    spent = sum(run.get("seconds", 0.0) for run in runs)
    edges = sum(row["edge"] for row in found)
    print(f"\n{len(runs)} runs took {spent / 60:.1f} minutes of training and scoring.")
    print(f"The study took {store.held / 60:.1f} GPU minutes{_without(store.unfinished)}.")
    print(f"{edges} of {len(found)} learning rates are at an edge.")
    for label, by_run in store.runs.items():
        for (rate, seed), run in by_run.items():
            if "failed" in run:
                print(f"- {label}, rate {rate:g}, seed {seed}: {run['failed']}")
    print(f"written to {draw(found, folder / 'mixture_in_blocks.png')}")


def draw(found: list[dict[str, Any]], path: Path) -> Path:
    """Macro-F1, and the paired difference to the dense adapter, over the active width, with 95 % intervals.

    Methods that were trained at only one width appear only in the table, unless all were. A hollow marker: the learning
    rate is at an edge of those that were tried. Returns the path.
    """
    widths = sorted({row["width"] for row in found})
    lines: dict[str, list[dict]] = {}
    for row in found:
        lines.setdefault(row["method"], []).append(row)
    if len(widths) > 1:
        lines = {name: line for name, line in lines.items() if len(line) > 1}
    figure = new_figure(8, "Mixtures inside the frozen ViT against a dense adapter of equal FLOPs")
    scores, differences = figure.subplots(2, 1, sharex=True)
    colours = {DENSE: "black"} | dict(zip([name for name in lines if name != DENSE], OKABE_ITO, strict=False))
    for index, (name, line) in enumerate(lines.items()):
        style = {"color": colours.get(name, "grey"), "marker": "os^Dv<>P"[index % 8], "markersize": 4}
        shift = 1.04 ** (index - len(lines) / 2)
        for axes, key in ((scores, "macro_f1"), (differences, "paired")):
            known = [row for row in line if key in row]
            points = [(shift * row["width"], *row[key]) for row in known]
            if points:
                _intervals(axes, points, {**style, "label": name})
            for (x, mean, *_), row in zip(points, known, strict=True):
                if row["edge"]:
                    axes.plot(x, 100 * mean, **{**style, "markerfacecolor": "white", "zorder": 3})
    scores.set_ylabel("test macro-F1 (%), 95 % interval")
    scores.legend(fontsize=8, title="hollow: learning rate at an edge", title_fontsize=8)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set_ylabel("paired difference to dense\n(points, 95 % interval)")
    differences.set_xlabel("active hidden units r of a mixture in each block (logarithmic)")
    differences.set_xscale("log", base=2)
    differences.set_xticks(widths, [str(width) for width in widths])
    for axes in (scores, differences):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def _intervals(axes: Any, points: list[tuple], style: dict[str, Any]) -> None:
    below = [100 * (0 if low is None else mean - low) for _, mean, low, _ in points]
    above = [100 * (0 if high is None else high - mean) for _, mean, _, high in points]
    axes.errorbar([x for x, *_ in points], [100 * mean for _, mean, *_ in points], [below, above], capsize=2, **style)
