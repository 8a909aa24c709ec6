"""The certainty of the gate: entropy, and samples near the routing boundary.

The gate's clean logits at its temperature, logits_NE, of N samples and E experts, are compared with the flat list of
assignments (`analysis.routing`), so that all rules that choose by logits, with any number of experts per sample, can be
analysed in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import FloatArray, served


def gate_entropy(logits_NE: ArrayLike) -> FloatArray:
    """Entropy of each sample's softmax over the experts, divided by its maximum log E; 1.0 means no preference.

    Returns (N,); zeros for a single expert. An expert with logit -inf has probability 0. Raises ValueError on a
    table without experts, or a sample without a finite logit.
    """
    logits_NE = _logits(logits_NE)
    if logits_NE.shape[1] == 1:
        return np.zeros(len(logits_NE))
    shifted_NE = logits_NE - logits_NE.max(axis=1, keepdims=True)
    probs_NE = np.exp(shifted_NE)
    probs_NE /= probs_NE.sum(axis=1, keepdims=True)
    log_NE = np.log(probs_NE, out=np.zeros_like(probs_NE), where=probs_NE > 0)
    return np.clip(-(probs_NE * log_NE).sum(axis=1) / np.log(logits_NE.shape[1]), 0.0, 1.0)


def boundary_margin(logits_NE: ArrayLike, sample_A: ArrayLike, expert_A: ArrayLike) -> FloatArray:
    """The margin of each sample's routing, in logits.

    The smallest logit among the sample's experts minus the largest among the others; for top-k, the gap between the
    k-th and the (k+1)-th. exp(margin) is the ratio of their gate probabilities. It is negative if the rule does not
    choose only by logits. Returns (N,), nan for a sample with no expert or with all experts. Raises ValueError on an
    index out of range or as `gate_entropy` does.
    """
    logits_NE = _logits(logits_NE)
    chosen_NE = served(sample_A, expert_A, *logits_NE.shape)
    margin_N = np.full(len(logits_NE), np.nan)
    split_N = chosen_NE.any(axis=1) & ~chosen_NE.all(axis=1)
    kept_N = np.where(chosen_NE, logits_NE, np.inf).min(axis=1)
    next_N = np.where(chosen_NE, -np.inf, logits_NE).max(axis=1)
    np.subtract(kept_N, next_N, out=margin_N, where=split_N)
    return margin_N


def gate_summary(
    logits_NE: ArrayLike,
    sample_A: ArrayLike,
    expert_A: ArrayLike,
    correct_N: ArrayLike,
    near: float = 0.1,
    nearest: int = 10,
) -> dict[str, Any]:
    """A summary of entropy and margins.

    near: a sample is near the boundary if the absolute value of its margin is smaller than this; at 0.1 the last chosen
    expert and the first one left out differ by 10 % in gate probability. Returns `entropy_mean` (relative to log E),
    `margin_median`, `boundary_share` (of the samples that have a margin), `boundary_accuracy` and
    `elsewhere_accuracy` (None if there is no such sample), and `nearest_samples`, the at most `nearest` samples with
    the smallest margins.
    """
    entropy_N = gate_entropy(logits_NE)
    margin_N = boundary_margin(logits_NE, sample_A, expert_A)
    correct_N = np.asarray(correct_N, dtype=np.float64)
    known_N = ~np.isnan(margin_N)
    near_N = known_N & (np.abs(np.where(known_N, margin_N, np.inf)) < near)
    return {
        "entropy_mean": _mean(entropy_N),
        "margin_median": float(np.median(margin_N[known_N])) if known_N.any() else None,
        "boundary_share": _mean(near_N[known_N]),
        "boundary_accuracy": _mean(correct_N[near_N]),
        "elsewhere_accuracy": _mean(correct_N[known_N & ~near_N]),
        "nearest_samples": [int(n) for n in np.argsort(np.abs(margin_N), kind="stable")[:nearest] if known_N[n]],
    }


@dataclass(frozen=True)
class Plane:
    """The plane that separates groups of samples best, and samples on it.

    points_N2: coordinates. explained_2: share of the between-group variance (relative to that within groups) on each
    axis. accuracy: share of the samples whose own group has the nearest centre on the plane. chance: share of the
    largest group, the score of a constant guess.
    """

    points_N2: FloatArray
    explained_2: FloatArray
    accuracy: float
    chance: float


def discriminant_plane(
    fit_MD: ArrayLike, fit_group_M: ArrayLike, shown_ND: ArrayLike, shown_group_N: ArrayLike
) -> Plane | None:
    """Samples on the first two axes of a linear discriminant analysis (Fisher 1936), fitted to other samples.

    fit_MD, shown_ND: features. The groups are small integers, such as the expert with the largest weight; negative: no
    group. Fitted and shown samples must differ: with more features than samples, any groups could be separated on the
    samples that the axes were fitted to. The features are first standardised and reduced to principal components, at
    most 64 and one per five samples. Returns None if fewer than three groups have five samples or more, because a plane
    needs three groups.
    """
    from sklearn.decomposition import PCA  # here, because importing scikit-learn takes seconds
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit_MD, group_M = np.asarray(fit_MD), np.asarray(fit_group_M)
    sizes_G = np.bincount(group_M[group_M >= 0], minlength=1)
    groups_G = np.flatnonzero(sizes_G >= 5)
    if len(groups_G) < 3:
        return None
    kept_M = np.isin(group_M, groups_G)
    fit_MD, group_M = fit_MD[kept_M], group_M[kept_M]
    components = min(64, fit_MD.shape[1], len(fit_MD) // 5)
    reduce = make_pipeline(StandardScaler(), PCA(components, svd_solver="randomized", random_state=0))
    lda = LinearDiscriminantAnalysis()
    fit_MA = lda.fit(reduce.fit_transform(fit_MD), group_M).transform(reduce.transform(fit_MD))
    centre_GA = np.stack([fit_MA[group_M == group].mean(axis=0) for group in groups_G])
    between_A = sizes_G[groups_G] @ np.square(centre_GA - fit_MA.mean(axis=0))
    points_N2 = lda.transform(reduce.transform(np.asarray(shown_ND)))[:, :2]
    nearest_N = np.square(points_N2[:, None] - centre_GA[:, :2]).sum(axis=2).argmin(axis=1)
    shown_N = np.asarray(shown_group_N)
    accuracy, largest = (groups_G[nearest_N] == shown_N).mean(), np.bincount(shown_N[shown_N >= 0], minlength=1).max()
    return Plane(points_N2, between_A[:2] / between_A.sum(), float(accuracy), float(largest / len(shown_N)))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _logits(logits_NE: ArrayLike) -> FloatArray:
    logits_NE = np.asarray(logits_NE, dtype=np.float64)
    if logits_NE.ndim != 2 or logits_NE.shape[1] == 0:
        raise ValueError(f"logits_NE must be samples by experts, got shape {logits_NE.shape}")
    if not np.isfinite(logits_NE.max(axis=1, initial=-np.inf)).all():
        raise ValueError("logits_NE has a sample without a finite largest logit")
    return logits_NE
