"""A model's predictions on a split, and its routing: the data for scores and figures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from analysis.routing import expert_importance, expert_load
from evaluation.block_routing import BlockRouting


@dataclass
class Removals:
    """Results of removing each of E experts.

    predicted_EN: the predictions if the expert is excluded and its samples go to their next choice. before_EE,
    after_EE: row e has the assignments (with positive weight) to each expert, of the samples of expert e, with and
    without it.
    """

    predicted_EN: np.ndarray
    before_EE: np.ndarray
    after_EE: np.ndarray


@dataclass
class Predictions:
    """A model's predictions for N samples, in the order of the split, and its routing as a list of A assignments.

    logits_NC: float32. labels_N, sample_A, expert_A: int64. weight_A: float32 gate weights. gate_NE: float32, the
    router's clean logits at its temperature. removals: if requested, and if there are two experts or more.
    blocks: the routing inside the ViT, if the experts are there. Then the list has, for each image and block, the
    expert with the largest weight, and the softmax of gate_NE is the mean gate of an image's tokens in all blocks.
    """

    logits_NC: np.ndarray
    labels_N: np.ndarray
    sample_A: np.ndarray
    expert_A: np.ndarray
    weight_A: np.ndarray
    gate_NE: np.ndarray
    removals: Removals | None = None
    blocks: BlockRouting | None = None

    @property
    def predicted_N(self) -> np.ndarray:
        """The class of the largest logit."""
        return self.logits_NC.argmax(axis=1)

    @property
    def probs_NC(self) -> np.ndarray:
        """Class probabilities, float32."""
        return torch.from_numpy(self.logits_NC).softmax(dim=1).numpy()

    @property
    def num_experts(self) -> int:
        """Number of routed experts, at each place."""
        return self.gate_NE.shape[1]

    @property
    def load_LE(self) -> np.ndarray:
        """Share of the assignments that each expert receives at each place."""
        return expert_load(self.expert_A, self.num_experts)[None] if self.blocks is None else self.blocks.load_LE

    @property
    def importance_LE(self) -> np.ndarray:
        """Share of the gate weight that each expert receives at each place."""
        if self.blocks is not None:
            return self.blocks.importance_LE
        return expert_importance(self.expert_A, self.weight_A, self.num_experts)[None]

    def tally(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """sample_A, expert_A, count_A (None: one each) and weight_A of all assignments, the list itself if it is
        complete.

        With experts inside the ViT an entry is an image and an expert, with sums over blocks and tokens.
        """
        if self.blocks is None:
            return self.sample_A, self.expert_A, None, self.weight_A
        images, experts = self.gate_NE.shape
        count_NE, weight_NE = (t.sum(axis=1) for t in (self.blocks.count_NLE, self.blocks.weight_NLE))
        sample_A, expert_A = np.arange(images).repeat(experts), np.tile(np.arange(experts), images)
        return sample_A, expert_A, count_NE.ravel(), weight_NE.ravel()

    def loss(self) -> float:
        """Mean cross-entropy in nats, without label smoothing."""
        return float(F.cross_entropy(torch.from_numpy(self.logits_NC), torch.from_numpy(self.labels_N)))
