"""Evaluation on the test set: metrics, tables, figures and a report in RUN/evaluation/."""

from typing import Any

import numpy as np
import torch

from analysis import answers, experts, gate, routing
from analysis.routing import balance_figures
from common.distributed import world
from common.environment import environment
from common.files import write_json
from config.config import Config, flatten
from data.image_set import ImageSet
from evaluation.blocks import WORTH_IMAGES, block_results, hardly_used, without_each_in_one_block
from evaluation.compression import with_test_score
from evaluation.cost import expert_costs
from evaluation.latency import latencies
from evaluation.metrics import per_class_scores, scores
from evaluation.predict import predict
from evaluation.predictions import Predictions
from evaluation.reporting import report
from evaluation.run_cost import run_cost
from evaluation.run_state import run_state
from features.bank import FeatureBank
from features.images import ImageBank
from model.backbone import Backbone
from model.moe_vit import AnyMoE, MoEViT
from storage.export import read_description
from storage.folder import RunFolder
from tracking.tracker import Tracker

Rows = list[dict[str, Any]]


def evaluate(
    run: RunFolder,
    config: Config,
    model: AnyMoE,
    bank: FeatureBank | ImageBank,
    tracker: Tracker | None = None,
    backbone: Backbone | None = None,
    worth_images: int | None = None,
    latency: bool | None = None,
) -> dict[str, Any]:
    """Evaluate `model` on the test split, write evaluation/metrics.json, figures/*.png and report.html, and report to
    `tracker`.

    backbone: to compute the total cost. worth_images: test images for the ablation of experts in single blocks of a ViT
    (None: 2,048 on a GPU, 0 on a CPU). latency: as `latencies` has it. Leaves the model in evaluation mode. Returns the
    content of metrics.json.
    Several processes share the work; rank 0 writes and reports.
    """
    # Here, because importing what draws and writes pages takes a second, which a wrong option need not wait for.
    from evaluation.figures import Evaluated, draw, warn_of_letters
    from evaluation.report import write_report
    from evaluation.verdict import verdict

    model.eval()
    predictions = predict(model, bank, "test", removals=True)
    if world().several:  # what figures read of it is extracted by all
        next(bank.batches("validation", 1, torch.tensor([0])))
    test = bank.splits.test
    results = _results(predictions, test, config, model) | {"environment": environment(bank.device)}
    results |= _blocks(predictions, test, model, bank, worth_images)
    if not world().first:
        return results
    described = read_description(run) if run.model.is_file() else {}
    kept = described.get("epoch")
    results |= {"init": _since(described["init"], results)} if described.get("init") else {}
    load_E, history = np.array(results["expert_load"]), run.history()
    measured = backbone and latencies(model, backbone, test.images_NCHW, latency)
    results["cost"] = run_cost(model, backbone, bank.feature_shape, load_E, history, kept, measured)
    if state := run_state(history, flatten(config.to_dict()), None):
        results["state"] = state
    if (found := verdict(run, config, results["macro_f1"])) is not None:
        results["dense_twin"] = found
    if compression := with_test_score(run, results["macro_f1"]):
        results["compression"] = compression
    write_json(run.results, results)
    warn_of_letters([*test.class_names, *test.coarse_names])
    drawings = draw(Evaluated(run, config, model, bank, predictions, results))
    write_report(run, config, results, drawings)
    if tracker is not None:
        report(run, results, drawings, tracker)
    return results


def _results(predictions: Predictions, test: ImageSet, config: Config, model: AnyMoE) -> dict[str, Any]:
    num_classes, num_experts = test.num_classes, predictions.num_experts
    labels_N, predicted_N = predictions.labels_N, predictions.predicted_N
    load_E = predictions.load_LE.mean(axis=0)
    confusion_CC = answers.confusion(labels_N, predicted_N, num_classes)
    pairs = answers.confused_pairs(confusion_CC, test.class_names)
    return {
        **scores(labels_N, predicted_N, num_classes),
        "loss": predictions.loss(),
        **_calibration(predictions),
        "images": len(labels_N),
        "expert_load": load_E.tolist(),
        "expert_importance": predictions.importance_LE.mean(axis=0).tolist(),
        "expert_underused": routing.underused(load_E, model.mixtures[0].router.target_E.cpu()).tolist(),
        **{key.removeprefix("balance/"): value for key, value in balance_figures(load_E).items()},
        "specialisation": routing.specialisation(
            labels_N, predictions.sample_A, predictions.expert_A, num_classes, num_experts
        ),
        **_experts(predictions, test, config, model),
        "class_names": list(test.class_names),
        **_class_tables(predictions, test, num_experts),
        "confused_pairs": [
            {"class": a, "other": b, "as_other": there, "other_as_class": back} for a, b, there, back in pairs
        ],
        "per_class": per_class_scores(labels_N, predicted_N, test.class_names),
    }


def _since(init: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """What is known of the run that this one starts from, and macro-F1 on its classes and on the others, if any."""
    before, found = set(init["classes"]), dict(init)
    for key, old in (("macro_f1_old_classes", True), ("macro_f1_new_classes", False)):
        rows = [row for name, row in results["per_class"].items() if (name in before) == old and row["support"]]
        found[key] = float(np.mean([row["f1"] for row in rows])) if rows else None
    return found


def _blocks(
    predictions: Predictions, test: ImageSet, model: AnyMoE, bank: FeatureBank | ImageBank, worth_images: int | None
) -> dict[str, Any]:
    """Results for each block, if the experts are inside the ViT."""
    if not isinstance(model, MoEViT):
        return {}
    images = worth_images if worth_images is not None else WORTH_IMAGES if bank.device.type == "cuda" else 0
    asked = images > 0 and predictions.num_experts > 1
    without_LEM = without_each_in_one_block(model, bank, "test", images) if asked else None
    return block_results(predictions, test, model.mixtures[0].router.target_E.cpu().numpy(), without_LEM)


def _calibration(predictions: Predictions) -> dict[str, Any]:
    bins = answers.calibration(predictions.probs_NC, predictions.labels_N)
    columns = {name: bins[f"{name}_B"] for name in ("confidence", "accuracy", "count")}
    columns["count"] = columns["count"].tolist()
    return {
        "expected_calibration_error": bins["error"],
        "calibration": {name: _plain(column) for name, column in columns.items()},
    }


def _experts(predictions: Predictions, test: ImageSet, config: Config, model: AnyMoE) -> dict[str, Any]:
    """Results for each expert."""
    num_experts = predictions.num_experts
    labels_N, sample_A, expert_A = predictions.labels_N, predictions.sample_A, predictions.expert_A
    correct_N = predictions.predicted_N == labels_N
    accuracy_E, samples_E = routing.mean_by_expert(correct_N, sample_A, expert_A, num_experts)
    confidence_E, _ = routing.mean_by_expert(predictions.probs_NC.max(axis=1), sample_A, expert_A, num_experts)
    hardest = experts.hardest_classes(correct_N, labels_N, sample_A, expert_A, test.class_names, num_experts)
    return {
        "gate": _gate(predictions, correct_N),
        "experts": config.experts.labels(),
        "expert_samples": samples_E.tolist(),
        "expert_accuracy": _plain(accuracy_E),
        "expert_confidence": _plain(confidence_E),
        "expert_hardest_classes": [
            [{"class": name, "accuracy": value, "samples": count} for name, value, count in rows] for rows in hardest
        ],
        "co_activation": experts.co_activation(sample_A, expert_A, len(labels_N), num_experts).tolist(),
        "expert_worth": _worth(predictions, test, model),
    }


def _gate(predictions: Predictions, correct_N: np.ndarray) -> dict[str, Any]:
    """The certainty of the gate; inside the ViT the mean over tokens and blocks, without a boundary per image."""
    summary = gate.gate_summary(predictions.gate_NE, predictions.sample_A, predictions.expert_A, correct_N)
    if predictions.blocks is None:
        return summary
    nothing = {key: [] if key == "nearest_samples" else None for key in summary}
    return nothing | {"entropy_mean": float(predictions.blocks.entropy_NL.mean())}


def _worth(predictions: Predictions, test: ImageSet, model: AnyMoE) -> Rows:
    """The cost of each expert and, with two or more, the test scores without it."""
    rows: Rows = [vars(cost) for cost in expert_costs(model)]
    flops_E = [row["flops"] for row in rows]
    removals = predictions.removals
    if removals is None:
        return rows
    columns: dict[str, np.ndarray] = experts.removal(
        predictions.labels_N, predictions.predicted_N, removals.predicted_EN, test.num_classes
    )
    tables = (removals.before_EE, removals.after_EE)
    columns["flops_saved"] = experts.cost_saved(*tables, flops_E, len(predictions.labels_N))
    columns["taken_over_by"] = experts.taken_over(*tables)
    return [row | {key: column[e].tolist() for key, column in columns.items()} for e, row in enumerate(rows)]


def _class_tables(predictions: Predictions, test: ImageSet, num_experts: int) -> dict[str, Any]:
    """Distribution of each class and superclass over the experts, by assignments and by gate weight."""
    *flat, count_A, weight_A = predictions.tally()
    group_C = test.superclass_of_class()
    sets = {"class": (predictions.labels_N, test.num_classes)}
    tables: dict[str, Any] = {}
    if group_C is not None:
        group_N, predicted_N = group_C[predictions.labels_N], group_C[predictions.predicted_N]
        sets["superclass"] = (group_N, len(test.coarse_names))
        tables["superclass_names"] = list(test.coarse_names)
        tables["superclass_accuracy"] = float((group_N == predicted_N).mean())
        tables["superclass_confusion"] = answers.confusion(group_N, predicted_N, len(test.coarse_names)).tolist()
    for name, (labels_N, count) in sets.items():
        for suffix, by_A in (("", count_A), ("_weight", weight_A)):
            table = routing.expert_by_class(labels_N, *flat, count, num_experts, by_A)
            tables[f"expert_by_{name}{suffix}"] = table.tolist()
    return tables


def _plain(values: np.ndarray) -> list[float | None]:
    """JSON has no nan."""
    return [None if np.isnan(value) else float(value) for value in values]


def table(results: dict[str, Any], hardest: int = 5) -> str:
    """The final table: scores; load, accuracy and worth of each expert; the classes with the lowest F1."""
    lines = [
        f"test images  {results['images']:,}",
        f"accuracy     {100 * results['accuracy']:.2f} %",
        f"macro-F1     {100 * results['macro_f1']:.2f} %",
        f"balance      entropy {results['entropy']:.3f} (1 is even), CV {results['cv']:.3f} (0 is even)",
        "",
        f"{'expert':<26}{'load':>8}{'weight':>8}{'accuracy':>10}{'macro-F1 change without it':>28}",
    ]
    columns = ("experts", "expert_load", "expert_importance", "expert_accuracy", "expert_worth")
    said = hardly_used(results)
    marks = [" !" if words else "" for words in said]
    for mark, label, load, weight, accuracy, worth in zip(marks, *(results[c] for c in columns), strict=True):
        shown = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
        change = f"{round(100 * worth['macro_f1_change'], 2) + 0.0:+.2f}" if "macro_f1_change" in worth else "-"
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
