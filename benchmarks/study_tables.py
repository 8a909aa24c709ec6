"""Tables of the study: means, deviations, paired intervals, agreement between seeds."""

import math
import statistics
from collections.abc import Collection
from itertools import combinations
from typing import Any

import numpy as np

from analysis.seeds import paired_interval
from benchmarks.study_heads import family_and_width, is_mixture


def agreement(first_SM: list[np.ndarray]) -> float | None:
    """Mean adjusted mutual information (Vinh 2010) between the routings of pairs of seeds.

    first_SM: for each seed, the expert with the largest weight of each image. 1: the same partition of the images,
    regardless of the numbering of the experts; 0: chance level. None for fewer than two seeds.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    pairs = list(combinations(first_SM, 2))
    return statistics.fmean(adjusted_mutual_info_score(a, b) for a, b in pairs) if pairs else None


def rows(
    runs: dict[str, dict[int, dict]],
    routings: dict[str, dict[int, np.ndarray]],
    partner: dict[str, str | None],
    total: dict[str, str] | None = None,
    seedless: Collection[str] = (),
) -> list[dict]:
    """One row per method, best first.

    runs: method -> seed -> scores. partner: the head that a method is compared with; total: the dense head with as many
    hidden units as all its experts. seedless: methods with a single result, which is paired with every seed.
    """
    found = []
    for method, by_seed in runs.items():
        seeds = sorted(by_seed)
        row: dict[str, Any] = {"method": method, "seeds": 1 if method in seedless else len(seeds)}
        for name in ("accuracy", "macro_f1", "ece", "loss", "entropy", "flops"):
            values = [by_seed[seed][name] for seed in seeds]
            known = None not in values
            row[name] = statistics.fmean(values) if known else None
            row[f"{name}_deviation"] = statistics.stdev(values) if known and row["seeds"] > 1 else None
        for name, rival in (("paired", partner.get(method)), ("paired_total", (total or {}).get(method))):
            theirs = runs.get(rival or "", {})
            if shared := [seed for seed in seeds if seed in theirs]:
                pairs = ([scores[seed]["macro_f1"] for seed in shared] for scores in (by_seed, theirs))
                row[name], row[f"{name}_with"] = paired_interval(*pairs), {"method": rival, "seeds": len(shared)}
        special = [by_seed[seed]["specialisation"] for seed in seeds if "specialisation" in by_seed[seed]]
        if special:
            row["specialisation"] = statistics.fmean(value["normalised"] for value in special)
            null = statistics.fmean(value["null_mean"] for value in special)
            row["null"] = null / math.log(by_seed[seeds[0]]["experts"])
            row["agreement"] = agreement([routings[method][seed] for seed in seeds if seed in routings.get(method, {})])
        found.append(row)
    return sorted(found, key=lambda row: -row["macro_f1"])


COLUMNS = [
    "method",
    "seeds",
    "accuracy",
    "macro-F1",
    "paired difference (95 %)",
    "to equal total (95 %)",
    "calibration error",
    "MFLOP",
    "balance",
    "specialisation (null)",
    "agreement",
]


def shown(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names and cells of the table's columns, without empty columns; scores in per cent."""
    lines = [_cells(row) for row in found]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    return [COLUMNS[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _cells(row: dict[str, Any]) -> list[str]:
    special = f"{row['specialisation']:.3f} ({row['null']:.3f})" if "specialisation" in row else "-"
    return [
        row["method"],
        str(row["seeds"]),
        _percent(row, "accuracy"),
        _percent(row, "macro_f1"),
        _interval(row.get("paired")),
        _interval(row.get("paired_total")),
        f"{100 * row['ece']:.1f}",
        f"{row['flops'] / 1e6:.2f}",
        "-" if row["entropy"] is None else f"{row['entropy']:.2f}",
        special,
        "-" if row.get("agreement") is None else f"{row['agreement']:.2f}",
    ]


def _interval(paired: tuple[float, float | None, float | None] | None) -> str:
    if paired is None:
        return "-"
    mean, *ends = paired
    interval = "one pair" if None in ends else " to ".join(f"{100 * end:+.2f}" for end in ends)
    return f"{100 * mean:+.2f} ({interval})"


def _percent(row: dict[str, Any], name: str) -> str:
    deviation = row[f"{name}_deviation"]
    return f"{100 * row[name]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def best(chosen: dict[str, dict]) -> dict[str, str]:
    """The dense head and the router with the highest validation macro-F1; none if one of them is missing."""
    scores = {name: choice["validation"] for name, choice in chosen.items()}
    dense = {name: score for name, score in scores.items() if name.startswith("dense")}
    routers = {name: score for name, score in scores.items() if is_mixture(chosen[name]["head"])}
    if not dense or not routers:
        return {}
    return {"dense": max(dense, key=dense.get), "router": max(routers, key=routers.get)}


def preferred(chosen: dict[str, dict]) -> set[str]:
    """For each width, the mixture with the highest validation macro-F1."""
    best: dict[int, str] = {}
    for method, choice in chosen.items():
        family, width = family_and_width(method)
        if family != "dense" and choice["validation"] > chosen.get(best.get(width), {"validation": 0})["validation"]:
            best[width] = method
    return set(best.values())
