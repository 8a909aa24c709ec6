"""A stratified split, equal to that of scikit-learn, without importing scikit-learn, which takes seconds."""

import math

import numpy as np


def stratified(labels_N: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of the held-out `fraction` of N labels, int64, each in order.

    Each class contributes proportionally to both parts, rounded down; the remaining samples go to the classes with the
    largest remainders (Hamilton's method), with random tie-breaking. The parts are those of scikit-learn's
    train_test_split(stratify=labels_N, test_size=fraction, random_state=seed). Raises ValueError if a part cannot have
    a sample of each class.
    """
    _, class_N, counts_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    held = math.ceil(fraction * len(labels_N))
    if min(held, len(labels_N) - held) < len(counts_C):
        raise ValueError(
            f"{held} of {len(labels_N)} samples do not leave {len(counts_C)} classes one each in both parts"
        )
    random = np.random.RandomState(seed)
    rest_C = _shares(counts_C, len(labels_N) - held, random)
    held_C = _shares(counts_C - rest_C, held, random)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    by_class = np.split(np.argsort(class_N, kind="stable"), counts_C.cumsum()[:-1])
    for positions, of_rest, of_held in zip(by_class, rest_C, held_C, strict=True):
        drawn = positions[random.permutation(len(positions))]
        parts[0].append(drawn[:of_rest])
        parts[1].append(drawn[of_rest : of_rest + of_held])
    rest, held_out = (np.sort(np.concatenate(part)) for part in parts)
    return rest, held_out


def _shares(counts_C: np.ndarray, total: int, random: np.random.RandomState) -> np.ndarray:
    """The number of samples of each class among `total`, in proportion to its count, int64."""
    exact_C = counts_C / counts_C.sum() * total
    whole_C = np.floor(exact_C)
    remainder_C, left = exact_C - whole_C, int(total - whole_C.sum())
    for value in np.sort(np.unique(remainder_C))[::-1]:
        if left <= 0:
            break
        equals = np.flatnonzero(remainder_C == value)
        chosen = random.choice(equals, size=min(len(equals), left), replace=False)
        whole_C[chosen] += 1
        left -= len(chosen)
    return whole_C.astype(np.int64)
