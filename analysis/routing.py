"""Who is sent to which expert: loads, class tables, specialisation.

The routing of N samples is a flat list of A assignments, `sample_A`, `expert_A` (integers) and `weight_A`
(gate weights): any number of experts a sample, none at all for a dropped one, so that token choice, expert
choice and capacity drops all read alike. Shapes: A assignments, N samples, E experts, C classes (or
superclasses).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def expert_load(expert_A: ArrayLike, num_experts: int) -> FloatArray:
    """Fraction of the assignments that each expert receives.

    Returns load_E, which sums to 1, or zeros where there is no assignment. Raises ValueError on an expert
    outside 0 .. num_experts - 1.
    """
    expert_A = _indices(expert_A, num_experts, "expert_A")
    return _normalised(np.bincount(expert_A, minlength=num_experts).astype(np.float64))


def expert_importance(expert_A: ArrayLike, weight_A: ArrayLike, num_experts: int) -> FloatArray:
    """Share of the gate weight that each expert receives (Shazeer 2017, eq. 6, divided by its sum).

    Returns importance_E, which sums to 1, or zeros where there is no weight. Raises ValueError on an expert
    out of range, or on a weight that is negative, not finite or missing.
    """
    expert_A = _indices(expert_A, num_experts, "expert_A")
    weight_A = _weights(weight_A, expert_A)
    return _normalised(np.bincount(expert_A, weights=weight_A, minlength=num_experts))


def expert_by_class(
    labels_N: ArrayLike,
    sample_A: ArrayLike,
    expert_A: ArrayLike,
    num_classes: int,
    num_experts: int,
    weight_A: ArrayLike | None = None,
) -> FloatArray:
    """For each class, how its samples' assignments are spread over the experts.

    labels_N: classes, or superclasses alike. weight_A: gate weights, to count each assignment by its weight
    instead of by one. Returns share_CE, whose rows sum to 1; the row of a class without assignments is
    zeros. Raises ValueError on an index out of range, lists of unequal length, or a bad weight.
    """
    return _normalised(_counts(labels_N, sample_A, expert_A, num_classes, num_experts, weight_A))


def load_entropy(load_E: ArrayLike) -> float:
    """Entropy of the load over its greatest value log E: 1.0 is perfect balance, 0.0 is one expert for all.

    A single expert is perfectly balanced: 1.0. A load without assignments (all zeros) has no balance: nan.
    The load is divided by its sum, so counts do too.
    """
    load_E = _load(load_E)
    if load_E.sum() == 0.0:
        return float("nan")
    if load_E.size == 1:
        return 1.0
    used = load_E[load_E > 0] / load_E.sum()
    return max(0.0, float(-(used * np.log(used)).sum() / np.log(load_E.size)))


def coefficient_of_variation(load_E: ArrayLike) -> float:
    """Population standard deviation of the load over its mean (Shazeer 2017, eq. 7, before squaring).

    At best 0.0, at worst sqrt(E - 1), where one expert takes all; 0.0 for one expert; nan for a load of
    zeros.
    """
    load_E = _load(load_E)
    mean = load_E.mean()
    return float(load_E.std(ddof=0) / mean) if mean > 0 else float("nan")


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
) -> dict[str, float]:
    """How much an expert tells about the class, against what the same routing tells about shuffled labels.

    The estimate of a mutual information is biased upwards by about (C - 1)(E - 1) / 2A nats, so the figure
    means something only beside its permutation null. Labels are shuffled among the samples that have an
    expert: the assignments of one sample stay together, since they are not independent.

    Returns `mutual_information` (nats), `normalised` (over log E; 0.0 for one expert), `null_mean` and
    `null_deviation` (nats) and `p_value` = (1 + #{null >= observed}) / (1 + permutations). Raises ValueError
    as `expert_by_class` does, or for fewer than one permutation.
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

    # Equal tables summed in another order differ in the last bits; a tie must count as one.
    as_high = int((null >= observed - 1e-12).sum())
    return {
        "mutual_information": observed,
        "normalised": observed / float(np.log(num_experts)) if num_experts > 1 else 0.0,
        "null_mean": float(null.mean()),
        "null_deviation": float(null.std(ddof=0)),
        "p_value": (1 + as_high) / (1 + permutations),
    }


def per_expert_accuracy(
    correct_N: ArrayLike, sample_A: ArrayLike, expert_A: ArrayLike, num_experts: int
) -> tuple[FloatArray, IntArray]:
    """Accuracy of the whole mixture over the samples that each expert had a part in.

    correct_N: 1 or True where the prediction is right. Returns accuracy_E (nan for an expert without
    samples) and samples_E; a sample counts once for each of its experts, even where it was sent to one of
    them twice.
    """
    correct_N = np.asarray(correct_N, dtype=np.float64)
    sample_A, expert_A = _pairs(sample_A, expert_A, len(correct_N), num_experts)
    pair = np.unique(sample_A * num_experts + expert_A)
    sample, expert = pair // num_experts, pair % num_experts
    samples_E = np.bincount(expert, minlength=num_experts)
    right_E = np.bincount(expert, weights=correct_N[sample], minlength=num_experts)
    accuracy_E = np.full(num_experts, np.nan)
    np.divide(right_E, samples_E, out=accuracy_E, where=samples_E > 0)
    return accuracy_E, samples_E


def top_classes(table_CE: ArrayLike, class_names: Sequence[str], expert: int, n: int) -> list[tuple[str, float]]:
    """The at most n classes that an expert serves most, as (name, table value), the greatest first.

    table_CE: shares of `expert_by_class` or counts. Classes that the expert never serves are left out; ties
    keep the order of the classes. Raises ValueError on an unknown expert or a table of another length than
    the names.
    """
    table_CE = np.asarray(table_CE, dtype=np.float64)
    if table_CE.ndim != 2 or len(table_CE) != len(class_names):
        raise ValueError(f"table_CE has shape {table_CE.shape} for {len(class_names)} class names")
    if not 0 <= expert < table_CE.shape[1]:
        raise ValueError(f"expert {expert} is not among the {table_CE.shape[1]} experts")
    value_C = table_CE[:, expert]
    order = np.argsort(-value_C, kind="stable")[: max(n, 0)]
    return [(class_names[c], float(value_C[c])) for c in order if value_C[c] > 0]


def _counts(labels_N, sample_A, expert_A, num_classes, num_experts, weight_A=None) -> FloatArray:
    labels_N = _indices(labels_N, num_classes, "labels_N")
    sample_A, expert_A = _pairs(sample_A, expert_A, len(labels_N), num_experts)
    weight_A = None if weight_A is None else _weights(weight_A, expert_A)
    return _table(labels_N[sample_A] * num_experts + expert_A, num_classes, num_experts, weight_A)


def _table(cell_A: IntArray, rows: int, columns: int, weight_A: FloatArray | None = None) -> FloatArray:
    flat = np.bincount(cell_A, weights=weight_A, minlength=rows * columns)
    return flat.reshape(rows, columns).astype(np.float64)


def _normalised(table: FloatArray) -> FloatArray:
    total = table.sum(axis=-1, keepdims=True)
    return np.divide(table, total, out=np.zeros(table.shape), where=total > 0)


def _pairs(sample_A, expert_A, num_samples: int, num_experts: int) -> tuple[IntArray, IntArray]:
    sample_A = _indices(sample_A, num_samples, "sample_A")
    expert_A = _indices(expert_A, num_experts, "expert_A")
    if len(sample_A) != len(expert_A):
        raise ValueError(f"sample_A has {len(sample_A)} assignments, expert_A {len(expert_A)}")
    return sample_A, expert_A


def _indices(values: ArrayLike, upper: int, name: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    # An empty list arrives as float64, and means what an empty integer array means.
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < upper):
        raise ValueError(f"{name} must lie in 0 .. {upper - 1}, got {array.min()} .. {array.max()}")
    return array.astype(np.int64)


def _weights(weight_A: ArrayLike, expert_A: IntArray) -> FloatArray:
    weight_A = np.asarray(weight_A, dtype=np.float64)
    if weight_A.shape != expert_A.shape:
        raise ValueError(f"weight_A has shape {weight_A.shape} for {len(expert_A)} assignments")
    if not np.isfinite(weight_A).all() or (weight_A < 0).any():
        raise ValueError("weight_A must be finite and not negative")
    return weight_A


def _load(load_E: ArrayLike) -> FloatArray:
    load_E = np.asarray(load_E, dtype=np.float64)
    if load_E.ndim != 1 or load_E.size == 0 or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError(f"load_E must be a list of finite fractions >= 0, got shape {load_E.shape}")
    return load_E
