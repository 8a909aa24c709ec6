"""Routing inside the ViT: sums over the many tokens of several blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.routers import Routing

KEPT_TOKENS = 64 * 2**20  # largest number of stored token choices, one byte each


@dataclass
class BlockRouting:
    """The routing of N images in L blocks with E experts.

    places: a name for each block. count_NLE: int32, tokens of an image that chose the expert. weight_NLE: float32, sum
    of their weights. first_MLT: uint8, the expert with the largest weight for each of T tokens, for the first M images.
    With routing per image, an image counts as one token, and T is 1. entropy_NL: float32, mean entropy of the gate of
    an image's tokens, divided by log E.
    """

    places: tuple[str, ...]
    count_NLE: np.ndarray
    weight_NLE: np.ndarray
    entropy_NL: np.ndarray
    first_MLT: np.ndarray

    @property
    def load_LE(self) -> np.ndarray:
        """Share of each block's assignments that each expert receives."""
        count_LE = self.count_NLE.sum(axis=0, dtype=np.int64)
        return count_LE / count_LE.sum(axis=1, keepdims=True).clip(min=1)

    @property
    def importance_LE(self) -> np.ndarray:
        """Share of each block's gate weight that each expert receives."""
        weight_LE = self.weight_NLE.sum(axis=0, dtype=np.float64)
        return weight_LE / weight_LE.sum(axis=1, keepdims=True).clip(min=1e-30)

    def by_class(self, labels_N: np.ndarray, num_classes: int) -> np.ndarray:
        """Gate weight that each class's images give each expert in each block, float64 (L, C, E)."""
        table_CLE = np.zeros((num_classes, *self.weight_NLE.shape[1:]))
        np.add.at(table_CLE, labels_N, self.weight_NLE)
        return table_CLE.transpose(1, 0, 2)

    def heaviest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The expert with the largest weight in each image and block, and its share: sample_A, expert_A, weight_A."""
        images, places, _ = self.weight_NLE.shape
        share_NL = self.weight_NLE.max(axis=2) / self.weight_NLE.sum(axis=2).clip(min=1e-30)
        sample_A = np.arange(images).repeat(places)
        return sample_A, self.weight_NLE.argmax(axis=2).ravel(), share_NL.astype(np.float32).ravel()


class BlockRoutingSums:
    """Sums the routings of batches on the device; `result` returns arrays."""

    def __init__(self, places: Sequence[str]):
        self.places = tuple(places)
        self.parts: list[tuple[Tensor, ...]] = []
        self.kept = 0

    def add(self, routings: Sequence[Routing], images: int) -> None:
        """Add the routings of a batch of `images` images."""
        counts, weights, entropies, firsts = [], [], [], []
        for routing in routings:
            weights_NE = routing.assignments.weights_BE
            chosen_NE = torch.zeros_like(weights_NE, dtype=torch.int32)
            chosen_NE[routing.sample_A, routing.expert_A] = 1
            counts.append(chosen_NE.view(images, -1, routing.num_experts).sum(dim=1, dtype=torch.int32))
            weights.append(weights_NE.view(images, -1, routing.num_experts).sum(dim=1))
            entropies.append(_entropy(routing.gate_logits_BE).view(images, -1).mean(dim=1))
            firsts.append(weights_NE.argmax(dim=1).to(torch.uint8).view(images, -1))
        first_BLT = torch.stack(firsts, dim=1)
        room = max(0, KEPT_TOKENS - self.kept) // first_BLT[0].numel()
        self.kept += first_BLT[:room].numel()
        sums = (torch.stack(column, dim=1) for column in (counts, weights, entropies))
        self.parts.append((*sums, first_BLT[:room]))

    def result(self) -> BlockRouting:
        """The routing of all batches."""
        columns = (torch.cat(column).cpu().numpy() for column in zip(*self.parts, strict=True))
        return BlockRouting(self.places, *columns)


def _entropy(logits_NE: Tensor) -> Tensor:
    """Entropy of each row's softmax over log E, float32 (N,); zeros for a single expert."""
    log_NE = logits_NE.float().log_softmax(dim=1)
    # An expert with logit -inf has probability 0 and does not contribute to the entropy.
    entropy_N = -(log_NE.exp() * log_NE.clamp_min(torch.finfo(torch.float32).min)).sum(dim=1)
    return entropy_N / max(math.log(logits_NE.shape[1]), 1e-30)
