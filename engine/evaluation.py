"""Score the test set of a run once: numbers, tables and figures under RUN/evaluation/."""

from typing import Any

import numpy as np

from analysis import plots, routing
from data.datasets import ImageSet
from data.features import FeatureBank
from engine.config import Config
from engine.metrics import balance_figures, per_class_scores, scores
from engine.predict import Predictions, predict
from engine.reporting import report
from engine.run_folder import RunFolder, write_json
from engine.tracking import Tracker
from model.classifier import VisionMoE

SAMPLES = 10  # images in the figure of samples
BATCH = 128  # samples in the figure of one batch's load


def evaluate(
    run: RunFolder, config: Config, model: VisionMoE, bank: FeatureBank, tracker: Tracker | None = None
) -> dict[str, Any]:
    """Score `model` on the test split, write evaluation/metrics.json and figures/*.png, and report both to `tracker`.

    Returns what metrics.json holds.
    """
    predictions = predict(model, bank, "test")
    test = bank.splits.test
    results = _results(predictions, test, config)
    write_json(run.evaluation / "metrics.json", results)
    _draw(run, config, predictions, test, results)
    if tracker is not None:
        report(run, results, tracker)
    return results


def _results(predictions: Predictions, test: ImageSet, config: Config) -> dict[str, Any]:
    num_classes, num_experts = test.num_classes, len(config.experts.sizes)
    labels_N, sample_A, expert_A = predictions.labels_N, predictions.sample_A, predictions.expert_A
    correct_N = predictions.predicted_N == labels_N
    load_E = routing.expert_load(expert_A, num_experts)
    by_class_CE = routing.expert_by_class(labels_N, sample_A, expert_A, num_classes, num_experts)
    accuracy_E, samples_E = routing.per_expert_accuracy(correct_N, sample_A, expert_A, num_experts)
    return {
        **scores(labels_N, predictions.predicted_N, num_classes),
        "loss": predictions.loss(),
        "images": len(labels_N),
        "expert_load": load_E.tolist(),
        "expert_importance": routing.expert_importance(expert_A, predictions.weight_A, num_experts).tolist(),
        **{key.removeprefix("balance/"): value for key, value in balance_figures(load_E).items()},
        "specialisation": routing.specialisation(labels_N, sample_A, expert_A, num_classes, num_experts),
        "expert_accuracy": [None if np.isnan(value) else float(value) for value in accuracy_E],
        "expert_samples": [int(count) for count in samples_E],
        "experts": config.experts.labels(),
        "class_names": list(test.class_names),
        "expert_by_class": by_class_CE.tolist(),
        "per_class": per_class_scores(labels_N, predictions.predicted_N, test.class_names),
    }


def _draw(run: RunFolder, config: Config, predictions: Predictions, test: ImageSet, results: dict[str, Any]) -> None:
    """Every figure of the run."""
    labels = config.experts.labels()
    groups_C = test.superclass_of_class()
    figures = {
        "expert_load": plots.expert_load(results["expert_load"], results["expert_importance"], labels),
        "expert_load_one_batch": _one_batch(predictions, labels),
        "expert_by_class": plots.expert_by_class(
            np.array(results["expert_by_class"]), test.class_names, labels, groups_C, test.coarse_names or None
        ),
        "samples": _samples(predictions, test),
    }
    if groups_C is not None:
        confusion_GG = np.zeros((len(test.coarse_names),) * 2)
        np.add.at(confusion_GG, (groups_C[predictions.labels_N], groups_C[predictions.predicted_N]), 1)
        figures["superclass_confusion"] = plots.superclass_confusion(confusion_GG, test.coarse_names)
    history = run.history()
    if history:
        figures["training_curves"] = plots.training_curves(history, best_by="macro_f1/validation")
        figures |= _load_over_time(history, config, len(labels), labels)
    for name, figure in figures.items():
        plots.save(figure, run.figures / f"{name}.png")


def _one_batch(predictions: Predictions, labels: list[str]):
    first_A = predictions.sample_A < BATCH
    expert_A, weight_A = predictions.expert_A[first_A], predictions.weight_A[first_A]
    return plots.expert_load(
        routing.expert_load(expert_A, len(labels)), routing.expert_importance(expert_A, weight_A, len(labels)), labels
    )


def _load_over_time(history: list[dict], config: Config, num_experts: int, labels: list[str]) -> dict[str, Any]:
    """The validation load of each epoch, which the learned gate decides in warm-up too."""
    keys = [f"expert_load_validation/expert_{e}" for e in range(num_experts)]
    lines = [line for line in history if all(key in line for key in keys)]
    if not lines:
        return {}
    steps_per_epoch = lines[0]["step"] / lines[0]["epoch"]
    load_TE = np.array([[line[key] for key in keys] for line in lines])
    epochs = [line["epoch"] for line in lines]
    warmup_epochs = config.router.warmup_steps / steps_per_epoch
    return {"load_over_time": plots.load_over_time(epochs, load_TE, labels, warmup_epochs)}


def _samples(predictions: Predictions, test: ImageSet):
    count = min(SAMPLES, len(test))
    experts = []
    for sample in range(count):
        mine_A = predictions.sample_A == sample
        pairs = sorted(zip(predictions.weight_A[mine_A], predictions.expert_A[mine_A], strict=True), reverse=True)
        experts.append([(str(expert), float(weight)) for weight, expert in pairs])
    return plots.samples(
        test.images_NCHW[:count].permute(0, 2, 3, 1).numpy(),
        [test.class_names[label] for label in predictions.labels_N[:count]],
        [test.class_names[label] for label in predictions.predicted_N[:count]],
        experts,
    )


def table(results: dict[str, Any], hardest: int = 5) -> str:
    """The closing table: scores, the load and accuracy of each expert, the classes with the lowest F1."""
    lines = [
        f"test images  {results['images']:,}",
        f"accuracy     {100 * results['accuracy']:.2f} %",
        f"macro-F1     {100 * results['macro_f1']:.2f} %",
        f"balance      entropy {results['entropy']:.3f} (1 is even), CV {results['cv']:.3f} (0 is even)",
        "",
        f"{'expert':<28}{'load':>8}{'weight':>8}{'accuracy':>10}",
    ]
    columns = ("experts", "expert_load", "expert_importance", "expert_accuracy")
    for label, load, weight, accuracy in zip(*(results[column] for column in columns), strict=True):
        shown = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
        lines.append(f"{label:<28}{100 * load:>6.1f} %{100 * weight:>6.1f} %{shown:>10}")
    worst = sorted(results["per_class"].items(), key=lambda item: item[1]["f1"])[:hardest]
    lines += ["", "lowest F1    " + ", ".join(f"{name} {100 * values['f1']:.0f} %" for name, values in worst)]
    return "\n".join(lines)
