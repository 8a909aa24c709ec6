"""Single samples: the most typical of each expert, and those on which two experts disagree. Shapes as in `routing`."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import IntArray, pairs, served, weights


def clearest(
    sample_A: ArrayLike, expert_A: ArrayLike, weight_A: ArrayLike, labels_N: ArrayLike, expert: int, n: int
) -> IntArray:
    """The at most n samples with the largest gate weights for an expert, each of a different class, descending."""
    labels_N = np.asarray(labels_N, dtype=np.int64)
    sample_A, expert_A = pairs(sample_A, expert_A, len(labels_N), max(int(np.max(expert_A, initial=0)), expert) + 1)
    weight_A = weights(weight_A, expert_A)
    mine_A = np.flatnonzero(expert_A == expert)
    sample_M = sample_A[mine_A[np.argsort(-weight_A[mine_A], kind="stable")]]
    _, first = np.unique(labels_N[sample_M], return_index=True)
    return sample_M[np.sort(first)[: max(n, 0)]]


def disagreements(
    alone_EN: ArrayLike, labels_N: ArrayLike, sample_A: ArrayLike, expert_A: ArrayLike
) -> dict[tuple[int, int], dict[str, IntArray]]:
    """Samples of two experts on which their predictions differ.

    alone_EN: the class that each expert predicts alone, or with the shared experts. Returns, for each pair (a, b), a <
    b, the samples that both process (`shared`), those of them with different predictions (`disagree`), and of these
    those on which only a is correct (`first`), only b (`second`), or neither (`neither`), each in ascending order.
    Raises ValueError on an index out of range or tables that do not fit.
    """
    alone_EN = np.asarray(alone_EN)
    num_experts, num_samples = alone_EN.shape
    labels_N = np.asarray(labels_N, dtype=np.int64)
    if len(labels_N) != num_samples:
        raise ValueError(f"alone_EN has shape {alone_EN.shape} for {len(labels_N)} samples")
    served_EN = served(sample_A, expert_A, num_samples, num_experts).T
    right_EN = alone_EN == labels_N
    table = {}
    for a, b in combinations(range(num_experts), 2):
        shared_N = served_EN[a] & served_EN[b]
        apart_N = shared_N & (alone_EN[a] != alone_EN[b])
        masks = {
            "shared": shared_N,
            "disagree": apart_N,
            "first": apart_N & right_EN[a],
            "second": apart_N & right_EN[b],
            "neither": apart_N & ~right_EN[a] & ~right_EN[b],
        }
        table[a, b] = {name: np.flatnonzero(mask_N) for name, mask_N in masks.items()}
    return table
