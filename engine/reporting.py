"""What ClearML shows of an evaluation: single values, tables, and plots that it can lay side by side for many runs."""

from typing import Any

from engine.run_folder import RunFolder
from engine.tracking import Tracker

SINGLE = ("accuracy", "macro_f1", "loss", "entropy", "cv")


def report(run: RunFolder, results: dict[str, Any], tracker: Tracker) -> None:
    """Send `results`, which evaluation/metrics.json holds, and the figures of `run` to `tracker`.

    Titles and series are the same in every run; experts are named by their index alone, since runs differ in the
    experts' sizes, which the configuration tells.
    """
    values = {f"test/{name}": results[name] for name in SINGLE if name in results}
    if "specialisation" in results:
        values["test/specialisation"] = results["specialisation"]["normalised"]
    tracker.summary(values)
    experts = [str(index) for index in range(len(results["experts"]))]
    shares = {"load": results["expert_load"], "gate weight": results["expert_importance"]}
    tracker.bars("expert load", "test", experts, shares)
    tracker.bars("expert accuracy", "test", experts, {"accuracy": results["expert_accuracy"]})
    by_class = results["expert_by_class"]
    tracker.matrix("experts by class", "test", by_class, ("class", results["class_names"]), ("expert", experts))
    classes = list(results["per_class"])
    tracker.bars("F1 by class", "test", classes, {"F1": [results["per_class"][name]["f1"] for name in classes]})
    columns = ("precision", "recall", "f1", "support")
    rows = [[name, *(values[column] for column in columns)] for name, values in results["per_class"].items()]
    tracker.table("scores by class", "test", ["class", *columns], rows)
    columns = ("experts", "expert_samples", "expert_load", "expert_importance", "expert_accuracy")
    rows = [list(row) for row in zip(*(results[column] for column in columns), strict=True)]
    tracker.table("experts", "test", ["expert", "samples", "load", "gate weight", "accuracy"], rows)
    for path in sorted(run.figures.glob("*.png")):
        tracker.figure("evaluation", path.stem, path)
        tracker.artifact(f"figure {path.stem}", path)
    tracker.artifact("evaluation", run.evaluation / "metrics.json")
