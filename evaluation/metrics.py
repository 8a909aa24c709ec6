"""Scores of predictions, by scikit-learn, and the balance of a load."""

import numpy as np


def scores(labels_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy and macro-F1, fractions; a class that is neither present nor predicted scores 0 in the mean."""
    from sklearn.metrics import accuracy_score, f1_score  # here, because importing scikit-learn takes seconds

    options = {"labels": np.arange(num_classes), "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(labels_N, predicted_N)),
        "macro_f1": float(f1_score(labels_N, predicted_N, average="macro", **options)),
    }


def per_class_scores(
    labels_N: np.ndarray, predicted_N: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Class name -> precision, recall, f1, support; 0 for a ratio of 0 to 0."""
    from sklearn.metrics import precision_recall_fscore_support

    options = {"labels": np.arange(len(class_names)), "zero_division": 0}
    columns = precision_recall_fscore_support(labels_N, predicted_N, **options)
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(class_names, *columns, strict=True)
    }
