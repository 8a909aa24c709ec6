"""Validation: what a model scores on the validation split, as the trainer logs it after each epoch."""

from dataclasses import dataclass

import numpy as np

from analysis.routing import expert_load
from evaluation.metrics import scores
from evaluation.predict import predict
from features.bank import FeatureBank
from model.classifier import VisionMoE


@dataclass(frozen=True)
class Validated:
    """loss: mean cross-entropy in nats. scores: accuracy and macro-F1. load_E: share of each expert, (E,)."""

    loss: float
    scores: dict[str, float]
    load_E: np.ndarray

    def values(self) -> dict[str, float]:
        """The numbers by "title/series"."""
        loads = {f"expert_load_validation/expert_{e}": float(share) for e, share in enumerate(self.load_E)}
        return {"loss/validation": self.loss, **{f"{key}/validation": v for key, v in self.scores.items()}, **loads}


def validate(model: VisionMoE, bank: FeatureBank) -> Validated:
    """Score a model on the validation split."""
    predictions = predict(model, bank, "validation")
    return Validated(
        predictions.loss(),
        scores(predictions.labels_N, predictions.predicted_N, bank.splits.train.num_classes),
        expert_load(predictions.expert_A, model.moe.router.num_experts),
    )
