"""The figures of one evaluation, each with the words that explain it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import plots, routing
from common.errors import EnvironmentFault
from config.config import Config
from data.image_set import ImageSet
from evaluation.predict import Predictions
from features.bank import FeatureBank
from storage.export import read_description
from storage.folder import RunFolder

SAMPLES = 10  # images in the figure of samples
BATCH = 128  # samples in the figure of one batch's load
MAP_SAMPLES = 1500  # points in the map of the features
MAP_NUMBERS = 50_000_000  # and at most so many features of them in memory
MAP_NAMES = 20  # classes that are named there

CAPTIONS = {
    "training_curves": "Losses and scores by epoch. The star is the epoch whose weights were kept. Training has "
    "dropout and smoothed labels, where they are on, and so a higher loss than validation.",
    "expert_by_class": "How the gate's weight for each class is spread over the experts; a column sums to 100 %. "
    "In brackets, where there is room: share of the assignments. An expert may see many images of a class and have "
    "little say in them.",
    "expert_load": "Load: share of the assignments. Importance: share of the gate's weight.",
    "expert_load_one_batch": f"The same for the first {BATCH} test images alone: how even a single batch is.",
    "load_over_time": "Measured on the validation images after each epoch, by the learned gate without noise. Within "
    "the shaded warm-up training routes at random, so what is shown there is an untrained gate.",
    "expert_worth": "What macro-F1 loses when one expert is removed and its samples go to the gate's next choice. "
    "Bars: one standard deviation over bootstrap resamples of the test images.",
    "feature_map": "Test images on the first two principal components of their standardised features, coloured by "
    "the expert that has most of their gate weight. Names stand near the median of their images.",
    "samples": "The first test images, with the experts that saw them and the gate's weights.",
    "superclass_confusion": "Share of each superclass's images, in percent; colours on a square-root scale.",
    "confused_pairs": "Pairs of classes by the number of images that were taken for the other.",
    "reliability": "How often the model is right where it is so sure. Bars below the diagonal: too sure.",
}


@dataclass(frozen=True)
class Drawing:
    """A figure on the disk."""

    name: str
    path: Path
    caption: str


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG. Raises EnvironmentFault where that cannot be done."""
    try:
        return plots.save(figure, path)
    except OSError as error:
        raise EnvironmentFault(f"{path} could not be written: {error.strerror or error}") from error


def draw(
    run: RunFolder, config: Config, predictions: Predictions, bank: FeatureBank, results: dict[str, Any]
) -> list[Drawing]:
    """Every figure of the evaluation, written to figures/*.png, in the order of CAPTIONS."""
    labels, test = config.experts.labels(), bank.splits.test
    figures = {
        "expert_load": plots.expert_load(results["expert_load"], results["expert_importance"], labels),
        "expert_load_one_batch": _one_batch(predictions, labels),
        "expert_by_class": plots.expert_by_class(
            results["expert_by_class_weight"],
            test.class_names,
            labels,
            test.superclass_of_class(),
            test.coarse_names or None,
            results["expert_by_class"],
        ),
        "samples": _samples(predictions, test),
        "reliability": _reliability(results),
        "confused_pairs": _confused_pairs(results),
        **worth(results),
        **_feature_map(predictions, bank, labels),
        **_over_time(run, config, labels),
    }
    if "superclass_confusion" in results:
        figures["superclass_confusion"] = plots.superclass_confusion(results["superclass_confusion"], test.coarse_names)
    return [
        Drawing(name, save_figure(figures[name], run.figures / f"{name}.png"), caption)
        for name, caption in CAPTIONS.items()
        if name in figures
    ]


def _one_batch(predictions: Predictions, labels: list[str]) -> Figure:
    count = min(BATCH, len(predictions.labels_N))
    first_A = predictions.sample_A < count
    expert_A, weight_A = predictions.expert_A[first_A], predictions.weight_A[first_A]
    return plots.expert_load(
        routing.expert_load(expert_A, len(labels)),
        routing.expert_importance(expert_A, weight_A, len(labels)),
        labels,
        f"one batch of {count} test images",
    )


def _over_time(run: RunFolder, config: Config, labels: list[str]) -> dict[str, Figure]:
    """The figures of the training, where metrics.jsonl tells of it."""
    history = run.history()
    if not history:
        return {}
    kept = read_description(run).get("epoch") if run.model.is_file() else None
    figures = {"training_curves": plots.training_curves(history, best_by="macro_f1/validation", kept=kept)}
    keys = [f"expert_load_validation/expert_{e}" for e in range(len(labels))]
    lines = [line for line in history if all(key in line for key in keys)]
    if lines:
        steps_per_epoch = lines[0]["step"] / lines[0]["epoch"]
        load_TE = np.array([[line[key] for key in keys] for line in lines], dtype=float)
        epochs = [line["epoch"] for line in lines]
        figures["load_over_time"] = plots.load_over_time(
            epochs, load_TE, labels, config.router.random_steps / steps_per_epoch
        )
    return figures


def worth(results: dict[str, Any]) -> dict[str, Figure]:
    """The figure of what each expert is worth, of two or more."""
    rows = results["expert_worth"]
    if "macro_f1_change" not in rows[0]:
        return {}
    change_E, deviation_E, parameters_E = (
        np.array([row[key] for row in rows]) for key in ("macro_f1_change", "macro_f1_deviation", "parameters")
    )
    return {
        "expert_worth": plots.expert_worth(
            -change_E, deviation_E, parameters_E, results["expert_load"], results["experts"]
        )
    }


def _confused_pairs(results: dict[str, Any]) -> Figure:
    keys = ("class", "other", "as_other", "other_as_class")
    errors = round(results["images"] * (1 - results["accuracy"]))
    return plots.confused_pairs([tuple(row[key] for key in keys) for row in results["confused_pairs"]], errors)


def _reliability(results: dict[str, Any]) -> Figure:
    columns = (results["calibration"][name] for name in ("confidence", "accuracy", "count"))
    bins = (np.array([np.nan if value is None else value for value in column]) for column in columns)
    return plots.reliability(*bins, results["expected_calibration_error"])


@torch.no_grad()
def _feature_map(predictions: Predictions, bank: FeatureBank, labels: list[str]) -> dict[str, Figure]:
    """Of samples spread evenly over the test set, of three or more: with fewer there is no plane to lay them on."""
    from sklearn.decomposition import PCA  # here, because importing scikit-learn takes seconds
    from sklearn.preprocessing import StandardScaler

    test = bank.splits.test
    width = math.prod(bank.feature_shape)
    count = min(len(test), MAP_SAMPLES, max(3, MAP_NUMBERS // width))
    if count < 3:
        return {}
    order_M = torch.linspace(0, len(test) - 1, count).round().long().unique()
    features = torch.cat([part.flatten(1).float().cpu() for part, _ in bank.batches("test", 256, order_M)]).numpy()
    pca = PCA(n_components=2, svd_solver="randomized", random_state=0)
    points_M2 = pca.fit_transform(StandardScaler(copy=False).fit_transform(features))
    weight_NE = np.zeros((len(test), len(labels)))
    np.add.at(weight_NE, (predictions.sample_A, predictions.expert_A), predictions.weight_A)
    expert_N = np.where(weight_NE.any(axis=1), weight_NE.argmax(axis=1), -1)
    groups = (test.coarse_N, test.coarse_names) if test.coarse_N is not None else (test.labels_N, test.class_names)
    group_N, names = groups if len(groups[1]) <= MAP_NAMES else (test.labels_N, ())
    index_M = order_M.numpy()
    experts_and_axes = (expert_N[index_M], labels, pca.explained_variance_ratio_)
    return {"feature_map": plots.feature_map(points_M2, *experts_and_axes, group_N.numpy()[index_M], names)}


def _samples(predictions: Predictions, test: ImageSet) -> Figure:
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
