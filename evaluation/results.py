"""The content of metrics.json for the predictions on the test images."""

from typing import Any

import numpy as np

from analysis import answers, experts, gate, routing
from analysis.routing import balance_figures
from config.config import Config
from data.image_set import ImageSet
from evaluation.cost import expert_costs
from evaluation.metrics import per_class_scores, scores
from evaluation.predictions import Predictions
from model.moe_vit import AnyMoE

Rows = list[dict[str, Any]]


def results_of(predictions: Predictions, test: ImageSet, config: Config, model: AnyMoE) -> dict[str, Any]:
    """Scores, calibration, load and results of each expert, for the predictions on the test images."""
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
        "expert_worth": worth(predictions, test, model),
    }


def _gate(predictions: Predictions, correct_N: np.ndarray) -> dict[str, Any]:
    """The certainty of the gate; inside the ViT the mean over tokens and blocks, without a boundary per image."""
    summary = gate.gate_summary(predictions.gate_NE, predictions.sample_A, predictions.expert_A, correct_N)
    if predictions.blocks is None:
        return summary
    nothing = {key: [] if key == "nearest_samples" else None for key in summary}
    return nothing | {"entropy_mean": float(predictions.blocks.entropy_NL.mean())}


def worth(predictions: Predictions, test: ImageSet, model: AnyMoE) -> Rows:
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
    columns["taken_over_by"] = experts.reassigned(*tables)
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
