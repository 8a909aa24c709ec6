"""Reports an evaluation to ClearML: single values, tables, and plots that can be compared between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.compression import EXPERT_HEADER, expert_rows, figure_rows
from evaluation.run_cost import NAMES
from storage.folder import RunFolder
from tracking.tracker import Tracker

if TYPE_CHECKING:
    from evaluation.figures import Drawing

SINGLE = ("accuracy", "macro_f1", "loss", "expected_calibration_error")


def report(run: RunFolder, results: dict[str, Any], drawings: Sequence[Drawing], tracker: Tracker) -> None:
    """Send `results` (the content of metrics.json), the figures and the report of `run` to `tracker`.

    Titles and series are the same in every run. Experts are named by index only, because their sizes may differ between
    runs; the configuration has them.
    """
    single = {f"test/{name}": results[name] for name in SINGLE}
    if len(results["experts"]) > 1:  # a dense twin has no routing
        single |= {f"test/{name}": results[name] for name in ("entropy", "cv")}
        single |= {"test/specialisation": results["specialisation"]["normalised"]}
    single |= {f"cost/{name}": results["cost"][name] for name in NAMES}
    tracker.summary(single | {f"load/expert_{index}": load for index, load in enumerate(results["expert_load"])})
    _report_experts(results, tracker)
    _report_blocks(results, tracker)
    _report_classes(results, tracker)
    if found := results.get("compression"):
        tracker.table("compression", "figures", ["what", "before", "after"], figure_rows(found))
        tracker.table("compression", "experts", EXPERT_HEADER, expert_rows(found))
    bins = results["calibration"]
    points = [(x, y) for x, y in zip(bins["confidence"], bins["accuracy"], strict=True) if None not in (x, y)]
    tracker.lines("reliability", {"test": points, "calibrated": [(0.0, 0.0), (1.0, 1.0)]}, ("confidence", "accuracy"))
    for drawing in drawings:
        tracker.figure("evaluation", drawing.name, drawing.path)
        tracker.artifact(f"figure {drawing.name}", drawing.path)
    tracker.artifact("evaluation", run.results)
    tracker.artifact("report", run.report)


def _report_experts(results: dict[str, Any], tracker: Tracker) -> None:
    experts, worth = [str(index) for index in range(len(results["experts"]))], results["expert_worth"]
    shares = {"load": results["expert_load"], "gate weight": results["expert_importance"]}
    tracker.bars("expert load", "test", experts, shares)
    quality = {"accuracy": results["expert_accuracy"], "confidence": results["expert_confidence"]}
    tracker.bars("expert accuracy", "test", experts, quality)
    changes = [row.get("macro_f1_change") for row in worth]
    if None not in changes:  # a single expert cannot be removed
        tracker.bars("macro-F1 without the expert", "test", experts, {"change": changes})
    header = ["expert", "samples", "load", "gate weight", "accuracy", "parameters", "macro-F1 change without it"]
    columns = ("experts", "expert_samples", "expert_load", "expert_importance", "expert_accuracy")
    rows = [list(row) for row in zip(*(results[column] for column in columns), strict=True)]
    for row, values, change in zip(rows, worth, changes, strict=True):
        row += [values["parameters"], change]
    tracker.table("experts", "test", header, rows)


def _report_blocks(results: dict[str, Any], tracker: Tracker) -> None:
    """Blocks by experts, if the experts are inside the ViT; ClearML shows those of several runs side by side."""
    rows = results.get("blocks", [])
    if not rows or len(results["experts"]) < 2:
        return
    blocks, experts = [str(row["block"]) for row in rows], [str(index) for index in range(len(results["experts"]))]
    axes = (("block", blocks), ("expert", experts))
    tracker.matrix("expert load by block", "test", [row["expert_load"] for row in rows], *axes)
    if "expert_worth" in rows[0]:
        changes = [row["expert_worth"]["macro_f1_change"] for row in rows]
        tracker.matrix("macro-F1 without the expert, by block", "test", changes, *axes)
    normalised = [row["specialisation"]["normalised"] for row in rows]
    tracker.bars("specialisation by block", "test", blocks, {"mutual information": normalised})


def _report_classes(results: dict[str, Any], tracker: Tracker) -> None:
    experts = ("expert", [str(index) for index in range(len(results["experts"]))])
    for kind in ("class", "superclass"):
        if f"{kind}_names" in results and len(experts[1]) > 1:
            rows = (kind, results[f"{kind}_names"])
            for series, suffix in (("gate weight", "_weight"), ("assignments", "")):
                shares = [row if any(row) else [None] * len(row) for row in results[f"expert_by_{kind}{suffix}"]]
                tracker.matrix(f"experts by {kind}", series, shares, rows, experts)
    if "superclass_names" in results:
        groups = results["superclass_names"]
        confusion = results["superclass_confusion"]
        tracker.matrix("superclass confusion", "test", confusion, ("true", groups), ("predicted", groups))
    scores = results["per_class"]
    drawn = [row["f1"] if row["support"] else None for row in scores.values()]  # without images: a gap, not 0
    tracker.bars("F1 by class", "test", list(scores), {"F1": drawn})
    columns = ("precision", "recall", "f1", "support")
    rows = [[name, *(row[column] for column in columns)] for name, row in scores.items()]
    tracker.table("scores by class", "test", ["class", *columns], rows)
