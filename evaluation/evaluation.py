"""Evaluation on the test set: metrics, tables, figures and a report in RUN/evaluation/."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.distributed import world
from common.environment import environment
from common.files import write_json
from common.imports import lazy_imports
from config.config import Config, flatten
from evaluation.blocks import WORTH_IMAGES, block_results, hardly_used, without_each_in_one_block
from evaluation.compression import with_test_score
from evaluation.latency import latencies
from evaluation.predict import predict
from evaluation.predictions import Predictions
from evaluation.reporting import report
from evaluation.results import results_of, worth
from evaluation.run_cost import run_cost
from evaluation.run_state import run_state
from evaluation.verdict import verdict
from features.bank import FeatureBank
from features.images import ImageBank
from model.backbone import Backbone
from model.moe_vit import AnyMoE, MoEViT
from storage.export import read_description
from storage.folder import RunFolder
from tracking.tracker import Tracker


def evaluate(
    run: RunFolder,
    config: Config,
    model: AnyMoE,
    bank: FeatureBank | ImageBank,
    tracker: Tracker | None = None,
    backbone: Backbone | None = None,
    worth_images: int | None = None,
    latency: bool | None = None,
    scored: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate `model` on the test split, write evaluation/metrics.json, figures/*.png and report.html, and report to
    `tracker`.

    backbone: to compute the total cost. worth_images: test images for the ablation of experts in single blocks of a ViT
    (None: 2,048 on a GPU, 0 on a CPU). latency: as in `latencies`. scored: called with the content of metrics.json as
    soon as the test set is scored, before experts are removed, latencies measured and figures drawn. Leaves the model
    in evaluation mode. Returns the content of metrics.json.
    Several processes share the work; rank 0 writes and reports.
    """
    model.eval()
    # Behind the ViT, removing experts in the same pass costs little; inside it, it costs as much as E more passes.
    predictions = predict(model, bank, "test", removals=not isinstance(model, MoEViT))
    if world().several:  # all processes extract the features that figures need
        next(bank.batches("validation", 1, torch.tensor([0])))
    results = _scored(run, config, predictions, model, bank, backbone)
    if world().first:
        write_json(run.results, results)
        if scored is not None:
            scored(results)
    predictions = _without_experts(results, predictions, model, bank, worth_images)
    if not world().first:
        return results
    if backbone is not None:
        results["cost"] |= latencies(model, backbone, bank.splits.test.images_NCHW, latency)
    write_json(run.results, results)
    _illustrate(run, config, model, bank, predictions, results, tracker)
    return results


def _scored(
    run: RunFolder,
    config: Config,
    predictions: Predictions,
    model: AnyMoE,
    bank: FeatureBank | ImageBank,
    backbone: Backbone | None,
) -> dict[str, Any]:
    """The content of metrics.json for the predictions; on rank 0 with the facts about the run."""
    test = bank.splits.test
    results = results_of(predictions, test, config, model) | {"environment": environment(bank.device)}
    results |= block_results(predictions, test, model.mixtures[0].router.target_E.cpu().numpy())
    if not world().first:
        return results
    described = read_description(run) if run.model.is_file() else {}
    results |= {"init": _since(described["init"], results)} if described.get("init") else {}
    load_E, history = np.array(results["expert_load"]), run.history()
    results["cost"] = run_cost(model, backbone, bank.feature_shape, load_E, history, described.get("epoch"))
    if state := run_state(history, flatten(config.to_dict()), None):
        results["state"] = state
    if (found := verdict(run, config, results["macro_f1"])) is not None:
        results["dense_twin"] = found
    if compression := with_test_score(run, results["macro_f1"]):
        results["compression"] = compression
    return results


def _without_experts(
    results: dict[str, Any],
    predictions: Predictions,
    model: AnyMoE,
    bank: FeatureBank | ImageBank,
    worth_images: int | None,
) -> Predictions:
    """The predictions, with those without each expert; adds the ablation of experts inside the ViT to the results."""
    if not isinstance(model, MoEViT) or predictions.num_experts == 1:
        return predictions
    test = bank.splits.test
    predictions = replace(predictions, removals=predict(model, bank, "test", removals=True).removals)
    results["expert_worth"] = worth(predictions, test, model)
    images = worth_images if worth_images is not None else WORTH_IMAGES if bank.device.type == "cuda" else 0
    if images:
        without_LEM = without_each_in_one_block(model, bank, "test", images)
        results |= block_results(predictions, test, model.mixtures[0].router.target_E.cpu().numpy(), without_LEM)
    return predictions


def _illustrate(
    run: RunFolder,
    config: Config,
    model: AnyMoE,
    bank: FeatureBank | ImageBank,
    predictions: Predictions,
    results: dict[str, Any],
    tracker: Tracker | None,
) -> None:
    """Draw the figures, write the report page, and log the results."""
    with lazy_imports():  # here, because importing matplotlib takes a second, and the scores need not wait for it
        from evaluation.figures import Evaluated, draw, warn_of_letters
        from evaluation.report import write_report

    test = bank.splits.test
    warn_of_letters([*test.class_names, *test.coarse_names])
    drawings = draw(Evaluated(run, config, model, bank, predictions, results))
    write_report(run, config, results, drawings)
    if tracker is not None:
        report(run, results, drawings, tracker)


def _since(init: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The run that this one starts from, and macro-F1 on its classes and on the other classes, if any."""
    before, found = set(init["classes"]), dict(init)
    for key, old in (("macro_f1_old_classes", True), ("macro_f1_new_classes", False)):
        rows = [row for name, row in results["per_class"].items() if (name in before) == old and row["support"]]
        found[key] = float(np.mean([row["f1"] for row in rows])) if rows else None
    return found


def table(results: dict[str, Any]) -> str:
    """The complete final table."""
    return f"{score_table(results)}\n{expert_table(results)}"


def print_scores(results: dict[str, Any]) -> None:
    """Print the first lines of the final table, at once."""
    print(score_table(results), flush=True)


def score_table(results: dict[str, Any]) -> str:
    """The first lines of the final table: scores and balance."""
    lines = [
        f"test images  {results['images']:,}",
        f"accuracy     {100 * results['accuracy']:.2f} %",
        f"macro-F1     {100 * results['macro_f1']:.2f} %",
    ]
    if len(results["expert_load"]) > 1:
        lines.append(f"balance      entropy {results['entropy']:.3f} (1 is even), CV {results['cv']:.3f} (0 is even)")
    return "\n".join(lines)


def expert_table(results: dict[str, Any], hardest: int = 5) -> str:
    """The rest of the final table: load, accuracy and contribution of each expert; the classes with the lowest F1."""
    heads = f"{'expert':<26}{'load':>8}{'weight':>8}{'accuracy':>10}{'macro-F1 change without it':>28}"
    lines = ["", heads]
    columns = ("experts", "expert_load", "expert_importance", "expert_accuracy", "expert_worth")
    said = hardly_used(results)
    marks = [" !" if words else "" for words in said]
    for mark, label, load, weight, accuracy, row in zip(marks, *(results[c] for c in columns), strict=True):
        shown = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
        change = "-"
        if "macro_f1_change" in row:
            change = f"{round(100 * row['macro_f1_change'], 2) + 0.0:+.2f} ± {100 * row['macro_f1_deviation']:.2f}"
        lines.append(f"{label + mark:<26}{100 * load:>6.1f} %{100 * weight:>6.1f} %{shown:>10}{change:>28}")
    lines += [f"! expert {expert} is {words}: hardly used" for expert, words in enumerate(said) if words]
    scored = {name: values["f1"] for name, values in results["per_class"].items() if values["support"]}
    worst = sorted((item for item in scored.items() if item[1] < 1), key=lambda item: item[1])[:hardest]
    if "state" in results:
        lines += ["", results["state"]]
    if "dense_twin" in results:
        lines += ["", results["dense_twin"]["text"]]
    for key, which in (("macro_f1_old_classes", "old classes"), ("macro_f1_new_classes", "new classes")):
        if (value := results.get("init", {}).get(key)) is not None:
            lines.append(f"macro-F1     {100 * value:.2f} % on the {which}")
    lines += ["", "lowest F1    " + (", ".join(f"{name}: {100 * f1:.0f} %" for name, f1 in worst) or "100 % for all")]
    return "\n".join(lines)
