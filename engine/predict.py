"""Run a trained model over a split and keep what the scores and the figures need."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from data.features import FeatureBank
from model.classifier import VisionMoE

BATCH_SIZE = 1024


@dataclass
class Predictions:
    """A model's answers on N samples, in the order of the split, and its routing as a flat list of A assignments.

    logits_NC: float32. labels_N, sample_A, expert_A: int64. weight_A: float32 gate weights.
    """

    logits_NC: np.ndarray
    labels_N: np.ndarray
    sample_A: np.ndarray
    expert_A: np.ndarray
    weight_A: np.ndarray

    @property
    def predicted_N(self) -> np.ndarray:
        """The class of the largest logit."""
        return self.logits_NC.argmax(axis=1)

    def loss(self) -> float:
        """Mean cross-entropy in nats, without label smoothing."""
        return float(F.cross_entropy(torch.from_numpy(self.logits_NC), torch.from_numpy(self.labels_N)))


@torch.no_grad()
def predict(model: VisionMoE, bank: FeatureBank, split: str) -> Predictions:
    """Answers for every image of a split as it is (no augmentation), with the learned gate and no noise.

    In float32 whatever training used, so that a sample's answer does not depend on its batch beyond rounding.
    """
    was_training = model.training
    model.eval()
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in Predictions.__dataclass_fields__}
    seen = 0
    for features, labels_B in bank.batches(split, BATCH_SIZE):
        logits_BC, routing = model(features)
        batch = (logits_BC, labels_B, routing.sample_A + seen, routing.expert_A, routing.weight_A)
        for column, value in zip(rows.values(), batch, strict=True):
            column.append(value)
        seen += len(labels_B)
    model.train(was_training)
    return Predictions(*(torch.cat(column).cpu().numpy() for column in rows.values()))
