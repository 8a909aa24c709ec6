"""Routing statistics: loads, class tables, specialisation.

The routing of N samples is a flat list of A assignments, `sample_A`, `expert_A` (integers) and `weight_A`
(gate weights): any number of experts per sample, none for a dropped one, so that token choice, expert choice and
capacity drops have the same form. Shapes: A assignments, N samples, E experts, C classes (or superclasses).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.arrays import FloatArray, IntArray, fractions, indices, pairs, ratio, served, weights

UNDERUSED = 0.01


def expert_load(expert_A: ArrayLike, num_experts: int) -> FloatArray:
    """Fraction of the assignments that each expert receives.

    Returns load_E, which sums to 1, or zeros if there is no assignment. Raises ValueError on an expert
    outside 0 .. num_experts - 1.
    """
    expert_A = indices(expert_A, num_experts, "expert_A")
    return _normalised(np.bincount(expert_A, minlength=num_experts).astype(np.float64))


def expert_importance(expert_A: ArrayLike, weight_A: ArrayLike, num_experts: int) -> FloatArray:
    """Share of the gate weight that each expert receives (Shazeer 2017, eq. 6, divided by its sum).

    Returns importance_E, which sums to 1, or zeros if there is no weight. Raises ValueError on an expert
    out of range, or on a weight that is negative, not finite or missing.
    """
    expert_A = indices(expert_A, num_experts, "expert_A")
    weight_A = weights(weight_A, expert_A)
    total_E = np.bincount(expert_A, weights=weight_A, minlength=num_experts)
    return _normalised(np.asarray(total_E, dtype=np.float64))


def expert_by_class(
    labels_N: ArrayLike,
    sample_A: ArrayLike,
    expert_A: ArrayLike,
    num_classes: int,
    num_experts: int,
    weight_A: ArrayLike | None = None,
) -> FloatArray:
    """For each class, the distribution of its samples' assignments over the experts.

    labels_N: classes or superclasses. weight_A: gate weights, to count each assignment by its weight instead of 1.
    Returns share_CE, whose rows sum to 1; the row of a class without assignments is
    zeros. Raises ValueError on an index out of range, lists of unequal length, or a bad weight.
    """
    return _normalised(_counts(labels_N, sample_A, expert_A, num_classes, num_experts, weight_A))


def load_entropy(load_E: ArrayLike) -> float:
    """Entropy of the load divided by its maximum log E: 1.0 is perfect balance, 0.0 is one expert for all samples.

    A single expert is perfectly balanced: 1.0. A load without assignments (all zeros) has no balance: nan.
    The load is divided by its sum, so counts work too.
    """
    load_E = fractions(load_E)
    if load_E.sum() == 0.0:
        return float("nan")
    if load_E.size == 1:
        return 1.0
    used = load_E[load_E > 0] / load_E.sum()
    return max(0.0, float(-(used * np.log(used)).sum() / np.log(load_E.size)))


def coefficient_of_variation(load_E: ArrayLike) -> float:
    """Population standard deviation of the load over its mean (Shazeer 2017, eq. 7, before squaring).

    Between 0.0 (best) and sqrt(E - 1), if one expert gets everything; 0.0 for one expert; nan for a load of zeros.
    """
    load_E = fractions(load_E)
    mean = load_E.mean()
    return float(load_E.std(ddof=0) / mean) if mean > 0 else float("nan")


def underused(load_E: ArrayLike, target_E: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Which experts are hardly used: below 1 % of the load, or below a tenth of their target share.

    The smaller limit applies, so that with many experts a fair share is enough. load_E: counts or
    shares. target_E: the share that each should have (None: 1/E). Returns (E,) bool; none where the load is all zeros.
    """
    load_E = fractions(load_E)
    due_E = np.full(len(load_E), 1 / len(load_E)) if target_E is None else fractions(target_E)
    total = load_E.sum()
    return (load_E < total * np.minimum(UNDERUSED, due_E / 10)) & (total > 0)


def mutual_information(counts_CE: ArrayLike) -> float:
    """Mutual information, in nats, of class and expert, from their contingency table (counts or gate
    weight).

    sum_ce p(c, e) log(p(c, e) / (p(c) p(e))); between 0.0 (routing ignores the class) and min(log C, log E).
    An empty table gives 0.0. Raises ValueError on a negative or non-finite count.
    """
    counts_CE = np.asarray(counts_CE, dtype=np.float64)
    if counts_CE.ndim != 2 or not np.isfinite(counts_CE).all() or (counts_CE < 0).any():
        raise ValueError(f"counts_CE must be a table of finite counts >= 0, got shape {counts_CE.shape}")
    total = counts_CE.sum()
    if total == 0.0:
        return 0.0
    joint_CE = counts_CE / total
    independent_CE = joint_CE.sum(1, keepdims=True) * joint_CE.sum(0, keepdims=True)
    present_CE = joint_CE > 0
    joint, independent = joint_CE[present_CE], independent_CE[present_CE]
    return max(0.0, float((joint * np.log(joint / independent)).sum()))


def specialisation(
    labels_N: ArrayLike,
    sample_A: ArrayLike,
    expert_A: ArrayLike,
    num_classes: int,
    num_experts: int,
    permutations: int = 200,
    seed: int = 0,
) -> dict[str, float | None]:
    """Mutual information of expert and class, compared with that for shuffled labels.

    The estimate of a mutual information is biased upwards by about (C - 1)(E - 1) / 2A nats, so it is only meaningful
    when compared with its permutation null. Labels are shuffled among the samples that have an expert; the assignments
    of one sample stay together, because they are not independent.

    Returns `mutual_information` (nats), `normalised` (over log E; 0.0 for one expert; with k experts of equal
    weight per sample at most 1 - log k / log E), `null_mean` and `null_deviation` (nats), `z_score` (None if the null
    does not vary) and `p_value` = (1 + #{null >= observed}) / (1 + permutations). Raises ValueError as
    `expert_by_class` does, or for fewer than one permutation.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    counts_CE = _counts(labels_N, sample_A, expert_A, num_classes, num_experts)
    observed = mutual_information(counts_CE)

    served_M, row_A = np.unique(np.asarray(sample_A, dtype=np.int64), return_inverse=True)
    labels_M = np.asarray(labels_N, dtype=np.int64)[served_M]
    expert_A = np.asarray(expert_A, dtype=np.int64)
    generator = np.random.default_rng(seed)
    null = np.empty(permutations)
    for trial in range(permutations):
        cell_A = generator.permutation(labels_M)[row_A] * num_experts + expert_A
        null[trial] = mutual_information(_table(cell_A, num_classes, num_experts))

    return null_summary(observed, null, num_experts)


def null_summary(observed: float, null_P: FloatArray, num_experts: int) -> dict[str, float | None]:
    """A mutual information (nats) compared with those of P permutations of the labels, as in `specialisation`."""
    mean, deviation = float(null_P.mean()), float(null_P.std(ddof=0))
    # Equal tables summed in a different order differ in the last bits, but must count as a tie.
    as_high = int((null_P >= observed - 1e-12).sum())
    return {
        "mutual_information": observed,
        "normalised": observed / float(np.log(num_experts)) if num_experts > 1 else 0.0,
        "null_mean": mean,
        "null_deviation": deviation,
        "z_score": (observed - mean) / deviation if deviation > 1e-12 else None,
        "p_value": (1 + as_high) / (1 + len(null_P)),
    }


def mean_by_expert(
    values_N: ArrayLike, sample_A: ArrayLike, expert_A: ArrayLike, num_experts: int
) -> tuple[FloatArray, IntArray]:
    """Mean of a value over the samples of each expert, such as 1 for a correct prediction.

    Returns mean_E (nan for an expert without samples) and samples_E; a sample counts once for each of its experts, even
    if it was sent to one of them twice.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    sample, expert = served(sample_A, expert_A, len(values_N), num_experts).nonzero()
    samples_E = np.bincount(expert, minlength=num_experts)
    sum_E = np.bincount(expert, weights=values_N[sample], minlength=num_experts)
    return ratio(sum_E, samples_E, np.nan), samples_E


def top_classes(table_CE: ArrayLike, class_names: Sequence[str], expert: int, n: int) -> list[tuple[str, float]]:
    """The at most n classes with the largest values for an expert, as (name, table value), in descending order.

    table_CE: shares from `expert_by_class`, or counts. Classes that the expert never processes are left out; ties keep
    the order of the classes. Raises ValueError on an unknown expert or a table whose length differs from the names.
    """
    table_CE = np.asarray(table_CE, dtype=np.float64)
    if table_CE.ndim != 2 or len(table_CE) != len(class_names):
        raise ValueError(f"table_CE has shape {table_CE.shape} for {len(class_names)} class names")
    if not 0 <= expert < table_CE.shape[1]:
        raise ValueError(f"expert {expert} is not among the {table_CE.shape[1]} experts")
    value_C = table_CE[:, expert]
    order = np.argsort(-value_C, kind="stable")[: max(n, 0)]
    return [(str(class_names[c]), float(value_C[c])) for c in order if value_C[c] > 0]


def _counts(labels_N, sample_A, expert_A, num_classes, num_experts, weight_A=None) -> FloatArray:
    labels_N = indices(labels_N, num_classes, "labels_N")
    sample_A, expert_A = pairs(sample_A, expert_A, len(labels_N), num_experts)
    weight_A = None if weight_A is None else weights(weight_A, expert_A)
    return _table(labels_N[sample_A] * num_experts + expert_A, num_classes, num_experts, weight_A)


def _table(cell_A: IntArray, rows: int, columns: int, weight_A: FloatArray | None = None) -> FloatArray:
    flat = np.bincount(cell_A, weights=weight_A, minlength=rows * columns)
    return flat.reshape(rows, columns).astype(np.float64)


def _normalised(table: FloatArray) -> FloatArray:
    return ratio(table, table.sum(axis=-1, keepdims=True))


def balance_figures(load_E: np.ndarray) -> dict[str, float]:
    """Entropy of the load (1 at perfect balance) and its coefficient of variation (0 at perfect balance)."""
    return {"balance/entropy": load_entropy(load_E), "balance/cv": coefficient_of_variation(load_E)}
