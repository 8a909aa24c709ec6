"""Shared helpers: checks of arguments, samples of each expert, ratios."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def pairs(sample_A, expert_A, num_samples: int, num_experts: int) -> tuple[IntArray, IntArray]:
    """The assignments as int64. Raises ValueError on an index out of range or lists of unequal length."""
    sample_A = indices(sample_A, num_samples, "sample_A")
    expert_A = indices(expert_A, num_experts, "expert_A")
    if len(sample_A) != len(expert_A):
        raise ValueError(f"sample_A has {len(sample_A)} assignments, expert_A {len(expert_A)}")
    return sample_A, expert_A


def served(sample_A, expert_A, num_samples: int, num_experts: int) -> NDArray[np.bool_]:
    """Whether a sample was sent to an expert at least once: (N, E) bool. Raises as `pairs` does."""
    served_NE = np.zeros((num_samples, num_experts), dtype=bool)
    served_NE[pairs(sample_A, expert_A, num_samples, num_experts)] = True
    return served_NE


def ratio(part: ArrayLike, whole: ArrayLike, empty: float = 0.0) -> FloatArray:
    """part / whole, broadcast together, and `empty` where the whole, which is never negative, is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), whole)
    return np.divide(part, whole, out=np.full(part.shape, empty), where=whole > 0)


def indices(values: ArrayLike, upper: int, name: str) -> IntArray:
    """Integers in 0 .. upper - 1 as int64. Raises ValueError, with the argument's name."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    # An empty list becomes float64, but means an empty integer array.
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < upper):
        raise ValueError(f"{name} must lie in 0 .. {upper - 1}, got {array.min()} .. {array.max()}")
    return array.astype(np.int64)


def weights(weight_A: ArrayLike, expert_A: IntArray) -> FloatArray:
    """A weight for each assignment. Raises ValueError on one that is negative, not finite or missing."""
    weight_A = np.asarray(weight_A, dtype=np.float64)
    if weight_A.shape != expert_A.shape:
        raise ValueError(f"weight_A has shape {weight_A.shape} for {len(expert_A)} assignments")
    if not np.isfinite(weight_A).all() or (weight_A < 0).any():
        raise ValueError("weight_A must be finite and not negative")
    return weight_A


def fractions(load_E: ArrayLike) -> FloatArray:
    """A load for each expert. Raises ValueError unless it is a list of finite numbers >= 0."""
    load_E = np.asarray(load_E, dtype=np.float64)
    if load_E.ndim != 1 or load_E.size == 0 or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError(f"load_E must be a list of finite fractions >= 0, got shape {load_E.shape}")
    return load_E
