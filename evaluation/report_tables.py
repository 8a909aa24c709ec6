"""The tables of evaluation/report.html, from the content of metrics.json."""

from dataclasses import dataclass
from typing import Any

from analysis.routing import top_classes
from evaluation import compression
from evaluation.blocks import hardly_used
from evaluation.compression import EXPERT_HEADER, EXPERT_LEGEND, expert_rows, figure_rows
from evaluation.run_cost import LEGEND, NAMES, shown, si

SPREAD_NOTE = "For each expert: share of the gate weight / of the assignments."
CO_ACTIVATION = 16  # largest number of experts for which the table of pairs is shown


@dataclass(frozen=True)
class Table:
    """A table of the page. text: headers of the columns that contain words. folded: shown when clicked."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    text: tuple[str, ...] = ()
    folded: bool = False


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 as "12.3 %", with a non-breaking space, and a dash for an unknown value."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def tables_of(results: dict[str, Any]) -> list[Table]:
    tables = [_cost_table(results), *_compression_tables(results.get("compression"))]
    tables += [_expert_table(results), _worth_table(results)]
    tables += [_block_table(results), _co_activation(results)]
    if "superclass_names" in results:
        rows = _spread(results["superclass_names"], results, "superclass")
        tables.append(Table("Superclasses", SPREAD_NOTE, ["superclass", *results["experts"]], rows))
    names = results["class_names"]
    scored = zip((results["per_class"][name] for name in names), _spread(names, results, "class"), strict=True)
    rows = [
        [
            name,
            *(percent(score[key] if score["support"] else None) for key in ("f1", "precision", "recall")),
            str(score["support"]),
            *shares,
        ]
        for score, (name, *shares) in sorted(scored, key=lambda pair: (not pair[0]["support"], pair[0]["f1"]))
    ]
    header = ["class", "F1", "precision", "recall", "images", *results["experts"]]
    tables.append(Table("Classes", "The hardest first. " + SPREAD_NOTE, header, rows, folded=len(names) > 20))
    return tables


def _spread(names: list[str], results: dict[str, Any], kind: str) -> list[list[str]]:
    """A row for each class or superclass: its name and its share for each expert."""
    tables = (results[f"expert_by_{kind}_weight"], results[f"expert_by_{kind}"])
    return [
        [name, *(f"{100 * weight:.0f} / {percent(share, 0)}" for weight, share in zip(*shares, strict=True))]
        for name, *shares in zip(names, *tables, strict=True)
    ]


def _cost_table(results: dict[str, Any]) -> Table:
    """The cost of the run and, if there is one in the same folder, of its mixture or dense twin of equal FLOPs."""
    beside = results.get("dense_twin", {}).get("beside")
    columns = (
        {"value": results["cost"]} if beside is None else {"this run": results["cost"], beside["name"]: beside["cost"]}
    )
    rows = [
        [what, *(shown(name, cost.get(name)) for cost in columns.values())]
        for name, what in NAMES.items()
        if any(cost.get(name) is not None for cost in columns.values())
    ]
    return Table("Cost", LEGEND, ["what", *columns], rows)


def _compression_tables(found: dict[str, Any] | None) -> list[Table]:
    """For a run of compress.py: its figures before and after, and what was done to each expert."""
    if not found:
        return []
    what = EXPERT_HEADER[2]
    return [
        Table("Compression", compression.LEGEND, ["what", "before", "after"], figure_rows(found)),
        Table("What was done to each expert", EXPERT_LEGEND, EXPERT_HEADER, expert_rows(found), text=(what,)),
    ]


def _expert_table(results: dict[str, Any]) -> Table:
    rows, said = [], hardly_used(results)
    for expert, label in enumerate(results["experts"]):
        most_weighted = top_classes(results["expert_by_class_weight"], results["class_names"], expert, 5)
        hardest = results["expert_hardest_classes"][expert]
        rows.append(
            [
                label + (f", hardly used: {said[expert]}" if said[expert] else ""),
                percent(results["expert_load"][expert]),
                percent(results["expert_importance"][expert]),
                percent(results["expert_accuracy"][expert]),
                percent(results["expert_confidence"][expert]),
                ", ".join(f"{name}: {percent(share, 0)}" for name, share in most_weighted if share >= 0.005),
                ", ".join(f"{row['class']}: {percent(row['accuracy'], 0)}" for row in hardest),
            ]
        )
    return Table(
        title="Experts",
        note="Accuracy and confidence of the whole mixture on the expert's images. "
        "Main classes: share of the gate weight for the class. Hardest: accuracy on the class, from 5 images.",
        header=["expert", "load", "gate weight", "accuracy", "confidence", "main classes", "hardest"],
        rows=rows,
        text=("main classes", "hardest"),
    )


def _block_table(results: dict[str, Any]) -> Table:
    """If several experts are inside the ViT, a row for each block."""
    rows = []
    for row in results.get("blocks", []) if len(results["experts"]) > 1 else []:
        special = row["specialisation"]
        z_score = "–" if special["z_score"] is None else f"{special['z_score']:.0f}"
        shares = zip(row["expert_importance"], row["expert_load"], row["expert_underused"], strict=True)
        cells = [f"{100 * weight:.0f} / {percent(load, 0)}{' !' if mark else ''}" for weight, load, mark in shares]
        rows.append([str(row["block"]), f"{special['normalised']:.3f}", z_score, *cells])
    return Table(
        title="Blocks",
        note="Specialisation: mutual information of class and expert over log E, by gate weight; z: standard "
        "deviations above shuffled labels. " + SPREAD_NOTE + " !: below 1 % of the load.",
        header=["block", "specialisation", "z", *results["experts"]],
        rows=rows,
    )


def _worth_table(results: dict[str, Any]) -> Table:
    rows = []
    for expert, row in enumerate(results["expert_worth"]):
        if "macro_f1_change" in row:
            successors = sorted(enumerate(row["taken_over_by"]), key=lambda item: -item[1])[:3]
            change = f"{100 * row['macro_f1_change']:+.2f} ± {100 * row['macro_f1_deviation']:.2f}"
            rows.append(
                [
                    results["experts"][expert],
                    change,
                    percent(row["answers_changed"]),
                    f"{row['parameters']:,}",
                    f"{row['bytes'] / 2**20:.2f} MiB",
                    si(row["flops"]),
                    si(row["flops_saved"]),
                    ", ".join(
                        f"expert {successor}: {percent(share, 0)}" for successor, share in successors if share > 0
                    ),
                ]
            )
    return Table(
        title="Contribution of each expert",
        note="Each expert is removed in turn, without retraining; its images go to the gate's next choice. "
        "Change of macro-F1 in points (below 0: the expert is useful) ± one standard deviation over bootstrap "
        "resamples of the test images. "
        "FLOPs saved below 0: its images go to larger experts.",
        header=[
            "without expert",
            "macro-F1 change",
            "answers changed",
            "parameters saved",
            "memory saved",
            "FLOPs of the expert",
            "FLOPs saved per image",
            "reassigned to",
        ],
        rows=rows,
        text=("reassigned to",),
    )


def _co_activation(results: dict[str, Any]) -> Table:
    table, labels = results["co_activation"], results["experts"]
    shown = 1 < len(labels) <= CO_ACTIVATION
    return Table(
        title="Experts that work together",
        note="Share of the images of the expert on the left that also go to the expert above.",
        header=["expert", *labels],
        rows=[
            [label, *("" if e == other else percent(count / max(1, row[e]), 0) for other, count in enumerate(row))]
            for e, (label, row) in enumerate(zip(labels, table, strict=True))
            if shown
        ],
    )
