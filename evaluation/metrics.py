"""Scores of predictions, as scikit-learn has them, without the seconds that importing it takes."""

import numpy as np

from analysis.answers import confusion


def scores(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy and macro-F1, fractions; a class that is neither present nor predicted scores 0 in the mean."""
    columns = _columns(labels_N, predicted_N, num_classes)
    return {"accuracy": float((labels_N == predicted_N).mean()), "macro_f1": float(columns["f1"].mean())}


def per_class_scores(
    labels_N: np.ndarray, predicted_N: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Class name -> precision, recall, f1, support; 0 for a ratio of 0 to 0."""
    columns = _columns(labels_N, predicted_N, len(class_names))
    return {name: {key: column[c].item() for key, column in columns.items()} for c, name in enumerate(class_names)}


def _columns(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """precision, recall, f1 and support of each class: tp / (tp + fp), tp / (tp + fn), 2 tp / (2 tp + fp + fn)."""
    confusion_CC = confusion(labels_N, predicted_N, num_classes)
    right_C, answered_C, support_C = np.diag(confusion_CC), confusion_CC.sum(axis=0), confusion_CC.sum(axis=1)
    ratios = {"precision": (right_C, answered_C), "recall": (right_C, support_C)}
    ratios["f1"] = (2 * right_C, answered_C + support_C)
    return {name: part_C / whole_C.clip(min=1) for name, (part_C, whole_C) in ratios.items()} | {"support": support_C}
