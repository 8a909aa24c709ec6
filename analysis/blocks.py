"""Experts inside a ViT's blocks: the specialisation of each block, and the expert of each patch.

Shapes: N images, M of them with the choices of single tokens, L blocks with experts, T tokens of which the last are the
patches in rows, H x W patches, E experts, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.arrays import FloatArray, indices
from analysis.routing import mutual_information, null_summary


def block_specialisation(
    labels_N: ArrayLike, weight_NLE: ArrayLike, num_classes: int, permutations: int = 200, seed: int = 0
) -> list[dict[str, Any]]:
    """For each block, how informative the expert of a token is about the class of its image, against shuffled labels.

    weight_NLE: the gate weight that an image's tokens give each expert, summed, or the number of tokens that choose it.
    Returns for each block the result of `analysis.routing.specialisation`. Labels are shuffled among the images, whose
    tokens stay together, with the same permutations for all blocks. Raises ValueError on a class out of range, a weight
    that is negative or not finite, or fewer than one permutation.
    """
    weight_NLE = np.asarray(weight_NLE, dtype=np.float64)
    labels_N = indices(labels_N, num_classes, "labels_N")
    if weight_NLE.ndim != 3 or len(weight_NLE) != len(labels_N):
        raise ValueError(f"weight_NLE has shape {weight_NLE.shape} for {len(labels_N)} images")
    if not np.isfinite(weight_NLE).all() or (weight_NLE < 0).any():
        raise ValueError("weight_NLE must be finite and not negative")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    order_N = np.argsort(labels_N, kind="stable")
    start_K = np.unique(labels_N[order_N], return_index=True)[1]  # of the K classes that have images
    generator = np.random.default_rng(seed)
    observed_L = _information(weight_NLE[order_N], start_K)
    shuffled = (generator.permutation(len(labels_N)) for _ in range(permutations))
    null_LP = np.stack([_information(weight_NLE[order], start_K) for order in shuffled], axis=1)
    num_experts = weight_NLE.shape[2]
    return [null_summary(observed, null_P, num_experts) for observed, null_P in zip(observed_L, null_LP, strict=True)]


def _information(weight_NLE: FloatArray, start_K: NDArray[np.intp]) -> list[float]:
    """Mutual information of class and expert in each block; the images of each class are consecutive from start_K."""
    table_KLE = np.add.reduceat(weight_NLE, start_K, axis=0)
    return [mutual_information(table_KE) for table_KE in table_KLE.transpose(1, 0, 2)]


def most_specialised(found: list[dict[str, Any]]) -> list[int]:
    """The indices of the blocks, sorted by how informative their experts are about the class beyond chance."""
    return sorted(range(len(found)), key=lambda place: found[place]["null_mean"] - found[place]["mutual_information"])


def patch_choices(first_MLT: ArrayLike, rows: int, columns: int) -> NDArray[np.integer]:
    """The expert of each patch, (M, L, H, W), from the experts of T tokens; the last H * W tokens are patches in rows.

    Raises ValueError if there are fewer tokens than patches.
    """
    first_MLT = np.asarray(first_MLT)
    patches = rows * columns
    if first_MLT.ndim != 3 or not 0 < patches <= first_MLT.shape[2]:
        raise ValueError(f"choices of shape {first_MLT.shape} do not hold {rows} x {columns} patches")
    return first_MLT[:, :, -patches:].reshape(*first_MLT.shape[:2], rows, columns)


def position_shares(choice_MLHW: ArrayLike, num_experts: int) -> FloatArray:
    """How often a patch at each position goes to each expert: shares (L, E, H, W) that sum to 1 over E.

    Raises ValueError on an expert out of range.
    """
    choice_MLHW = np.asarray(choice_MLHW)
    images, *places = choice_MLHW.shape
    count_PE = np.zeros((int(np.prod(places)), num_experts))
    for choice_P in choice_MLHW.reshape(images, -1):
        count_PE[np.arange(len(count_PE)), indices(choice_P, num_experts, "choice_MLHW")] += 1
    return np.moveaxis((count_PE / max(1, images)).reshape(*places, num_experts), -1, 1)


def evenly_spaced(count: int, most: int, including: int | None = None) -> list[int]:
    """At most `most` of the numbers 0 .. count - 1, in order: first, last and evenly between them.

    including: a number that must be among them; it replaces its nearest neighbour, except the first and last.
    """
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
    if including is not None and including not in chosen:
        inner = chosen[1:-1] or chosen[1:] or chosen
        chosen[chosen.index(min(inner, key=lambda number: abs(number - including)))] = including
    return sorted(chosen)
