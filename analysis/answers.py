"""The predictions of the model: confusions and calibration.

Shapes: N samples, C classes (or superclasses), B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import IntArray, indices, ratio


def confusion(labels_N: ArrayLike, predicted_N: ArrayLike, num_classes: int) -> IntArray:
    """Counts (C, C), true class by predicted class. Raises ValueError on a class out of range."""
    labels_N, predicted_N = (
        indices(values, num_classes, name) for values, name in ((labels_N, "labels_N"), (predicted_N, "predicted_N"))
    )
    if len(labels_N) != len(predicted_N):
        raise ValueError(f"labels_N has {len(labels_N)} samples, predicted_N {len(predicted_N)}")
    cell_N = labels_N * num_classes + predicted_N
    return np.bincount(cell_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(confusion_CC: ArrayLike, class_names: Sequence[str], n: int = 30) -> list[tuple[str, str, int, int]]:
    """The at most n pairs of classes with the most confusions in both directions, in descending order.

    Returns (name a, name b, samples of a predicted as b, samples of b predicted as a); a is the class that is mistaken
    for the other more often. Pairs without confusions are left out; ties keep the order of the classes.
    """
    confusion_CC = np.asarray(confusion_CC, dtype=np.int64)
    both_CC = np.triu(confusion_CC + confusion_CC.T, k=1)
    order = np.argsort(-both_CC.ravel(), kind="stable")[:n]
    result = []
    for cell in order[both_CC.ravel()[order] > 0]:
        a, b = divmod(int(cell), len(confusion_CC))
        if confusion_CC[b, a] > confusion_CC[a, b]:
            a, b = b, a
        result.append((class_names[a], class_names[b], int(confusion_CC[a, b]), int(confusion_CC[b, a])))
    return result


def calibration(probs_NC: ArrayLike, labels_N: ArrayLike, bins: int = 15) -> dict[str, Any]:
    """How often the model is right at each confidence (Guo 2017, "On calibration of modern neural networks", eq. 3).

    The samples are sorted into B equal bins (i/B, (i+1)/B] of the probability of the predicted class. Returns
    `confidence_B` and `accuracy_B` (means, nan in an empty bin), `count_B`, and `error`: the mean over the samples
    of |accuracy - confidence| of their bin. Raises ValueError on rows that do not sum to 1, or no bins.
    """
    probs_NC = np.asarray(probs_NC, dtype=np.float64)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if probs_NC.ndim != 2 or not np.allclose(probs_NC.sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"probs_NC must hold probabilities of the classes, got shape {probs_NC.shape}")
    labels_N = indices(labels_N, probs_NC.shape[1], "labels_N")
    confidence_N = np.minimum(probs_NC.max(axis=1), 1.0)
    correct_N = probs_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    count_B = np.bincount(bin_N, minlength=bins)
    confidence_B, accuracy_B = (
        ratio(np.bincount(bin_N, weights=values_N, minlength=bins), count_B, np.nan)
        for values_N in (confidence_N, correct_N)
    )
    gap_B = np.where(count_B > 0, np.abs(accuracy_B - confidence_B), 0.0)
    return {
        "confidence_B": confidence_B,
        "accuracy_B": accuracy_B,
        "count_B": count_B,
        "error": float((gap_B * count_B).sum() / max(1, len(labels_N))),
    }
