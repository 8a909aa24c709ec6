"""Results of each expert: hardest classes, co-activation, and the score without it.

Shapes as in `analysis.routing`; R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import FloatArray, IntArray, indices, ratio, served


def co_activation(sample_A: ArrayLike, expert_A: ArrayLike, num_samples: int, num_experts: int) -> IntArray:
    """Number of samples (E, E) that both experts process; the diagonal has all samples of an expert. Symmetric."""
    # Products of floats are faster than those of integers.
    served_NE = served(sample_A, expert_A, num_samples, num_experts).astype(np.float64)
    return (served_NE.T @ served_NE).astype(np.int64)


def hardest_classes(
    correct_N: ArrayLike,
    labels_N: ArrayLike,
    sample_A: ArrayLike,
    expert_A: ArrayLike,
    class_names: Sequence[str],
    num_experts: int,
    n: int = 3,
    at_least: int = 5,
) -> list[list[tuple[str, float, int]]]:
    """For each expert, the at most n classes with the lowest accuracy of the mixture on the expert's samples.

    Only classes with `at_least` samples of the expert and at least one error. Returns lists of (name, accuracy,
    samples), sorted by ascending accuracy; ties by descending number of samples.
    """
    correct_N = np.asarray(correct_N, dtype=np.float64)
    labels_N = indices(labels_N, len(class_names), "labels_N")
    sample, expert = served(sample_A, expert_A, len(labels_N), num_experts).nonzero()
    shape = (num_experts, len(class_names))
    cell = expert * len(class_names) + labels_N[sample]
    count_EC = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    right_EC = np.bincount(cell, weights=correct_N[sample], minlength=shape[0] * shape[1]).reshape(shape)
    result = []
    for count_C, right_C in zip(count_EC, right_EC, strict=True):
        accuracy_C = right_C / np.maximum(count_C, 1)
        order = [c for c in np.lexsort((-count_C, accuracy_C)) if count_C[c] >= at_least and accuracy_C[c] < 1]
        result.append([(class_names[c], float(accuracy_C[c]), int(count_C[c])) for c in order[:n]])
    return result


def removal(
    labels_N: ArrayLike,
    predicted_N: ArrayLike,
    without_EN: ArrayLike,
    num_classes: int,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """The change of scores when one expert at a time is removed from the mixture.

    without_EN: the predictions without each expert, with its samples re-routed to their next choice. Returns, for each
    expert, `macro_f1_change` and `accuracy_change` (score without it minus score with it: negative for a useful
    expert), `macro_f1_deviation`, the standard deviation of the former over bootstrap resamples of the samples (the
    same ones for both scores), and `answers_changed`, a share of the samples. Raises ValueError on a class out of range
    or tables that do not fit.
    """
    labels_N = indices(labels_N, num_classes, "labels_N")
    predicted_N = indices(predicted_N, num_classes, "predicted_N")
    without_EN = np.asarray(without_EN)
    if without_EN.ndim != 2 or without_EN.shape[1:] != labels_N.shape or labels_N.shape != predicted_N.shape:
        raise ValueError(f"without_EN has shape {without_EN.shape} for {len(labels_N)} samples")
    samples = len(labels_N)
    generator = np.random.default_rng(seed)
    # How often each sample is drawn; row 0 is the original sample.
    drawn_RN = np.ones((1 + resamples, samples))
    for row in drawn_RN[1:]:
        row[:] = np.bincount(generator.integers(0, samples, samples), minlength=samples)
    actual_RC, predicted_RC, right_RC = _tallies(drawn_RN, labels_N, predicted_N, num_classes)
    before_R = _macro_f1(actual_RC, predicted_RC, right_RC)
    columns: dict[str, list[float]] = {
        key: [] for key in ("macro_f1_change", "macro_f1_deviation", "accuracy_change", "answers_changed")
    }
    for without_N in indices(without_EN.ravel(), num_classes, "without_EN").reshape(without_EN.shape):
        changed_M = np.flatnonzero(without_N != predicted_N)
        drawn_RM, labels_M = drawn_RN[:, changed_M], labels_N[changed_M]
        _, old_RC, old_right_RC = _tallies(drawn_RM, labels_M, predicted_N[changed_M], num_classes)
        _, new_RC, new_right_RC = _tallies(drawn_RM, labels_M, without_N[changed_M], num_classes)
        after_R = _macro_f1(actual_RC, predicted_RC - old_RC + new_RC, right_RC - old_right_RC + new_right_RC)
        change_R = after_R - before_R
        columns["macro_f1_change"].append(float(change_R[0]))
        columns["macro_f1_deviation"].append(float(change_R[1:].std()) if resamples else 0.0)
        columns["accuracy_change"].append(float((new_right_RC[0].sum() - old_right_RC[0].sum()) / max(1, samples)))
        columns["answers_changed"].append(len(changed_M) / max(1, samples))
    return {key: np.array(values, dtype=np.float64) for key, values in columns.items()}


def reassigned(before_EE: ArrayLike, after_EE: ArrayLike) -> FloatArray:
    """Experts to which the samples of each expert are reassigned, as shares (E, E) whose rows sum to 1, or zeros.

    Row e of each table: the assignments, to each expert, of the samples that use expert e, before and after e is
    removed.
    """
    gained_EE = np.clip(np.asarray(after_EE, dtype=np.float64) - np.asarray(before_EE, dtype=np.float64), 0, None)
    return ratio(gained_EE, gained_EE.sum(axis=1, keepdims=True))


def cost_saved(before_EE: ArrayLike, after_EE: ArrayLike, cost_E: ArrayLike, num_samples: int) -> FloatArray:
    """Cost saved per mean sample without each expert, after its samples were reassigned; negative: extra cost.

    cost_E: of one sample in each expert, such as FLOPs. The tables are those of `reassigned`.
    """
    saved_EE = np.asarray(before_EE, dtype=np.float64) - np.asarray(after_EE, dtype=np.float64)
    return saved_EE @ np.asarray(cost_E, dtype=np.float64) / max(1, num_samples)


def _tallies(drawn_RN: FloatArray, labels_N: IntArray, predicted_N: IntArray, num_classes: int) -> Any:
    """Samples, predictions and correct predictions of each class, (R, C) each."""
    right_N = (labels_N == predicted_N).astype(np.float64)
    return (
        _count_rows(drawn_RN, labels_N, num_classes),
        _count_rows(drawn_RN, predicted_N, num_classes),
        _count_rows(drawn_RN * right_N, labels_N, num_classes),
    )


def _count_rows(drawn_RN: FloatArray, class_N: IntArray, num_classes: int) -> FloatArray:
    rows = len(drawn_RN)
    cell = (np.arange(rows)[:, None] * num_classes + class_N).ravel()
    counts = np.bincount(cell, weights=drawn_RN.ravel(), minlength=rows * num_classes)
    return np.asarray(counts, dtype=np.float64).reshape(rows, num_classes)


def _macro_f1(actual_RC: FloatArray, predicted_RC: FloatArray, right_RC: FloatArray) -> FloatArray:
    """Macro-F1 of each row; a class that is neither present nor predicted scores 0 in the mean."""
    return ratio(2 * right_RC, actual_RC + predicted_RC).mean(axis=1)
