"""Validation scores, which the trainer logs after each epoch."""

from dataclasses import dataclass

import numpy as np

from evaluation.metrics import scores
from evaluation.predict import predict
from features.bank import FeatureBank
from features.images import ImageBank
from model.moe_vit import AnyMoE


@dataclass(frozen=True)
class Validated:
    """loss: mean cross-entropy in nats. scores: accuracy and macro-F1. load_LE: share of each expert at each place."""

    loss: float
    scores: dict[str, float]
    load_LE: np.ndarray

    def values(self) -> dict[str, float]:
        """The numbers by "title/series"."""
        loads = {
            f"expert_load_validation/expert_{e}": float(share) for e, share in enumerate(self.load_LE.mean(axis=0))
        }
        return {"loss/validation": self.loss, **{f"{key}/validation": v for key, v in self.scores.items()}, **loads}


def validate(model: AnyMoE, bank: FeatureBank | ImageBank) -> Validated:
    """Evaluate a model on the validation split."""
    predictions = predict(model, bank, "validation")
    return Validated(
        predictions.loss(),
        scores(predictions.labels_N, predictions.predicted_N, bank.splits.train.num_classes),
        predictions.load_LE,
    )
