"""Knowledge distillation: the task loss of a student with trained models as teachers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.moe_vit import AnyMoE


class Teacher:
    """One or more trained models, whose predictions are a student's targets in addition to the labels.

    They read the same inputs as the student, in evaluation mode. The target is the mean of their class probabilities
    at `temperature`; `weight` is its share of the loss, the rest is that of the labels.
    """

    def __init__(self, models: Sequence[AnyMoE], temperature: float, weight: float):
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.temperature, self.weight = temperature, weight

    @torch.no_grad()
    def targets(self, inputs: Tensor) -> Tensor:
        """Class probabilities (B, C), float32."""
        each = [model(inputs)[0].float() for model in self.models]
        return torch.stack([(logits_BC / self.temperature).softmax(dim=1) for logits_BC in each]).mean(dim=0)

    def loss(self, targets_BC: Tensor, logits_BC: Tensor, labels_B: Tensor, label_smoothing: float) -> Tensor:
        """weight T^2 KL(targets || softmax(logits / T)) + (1 - weight) cross-entropy (Hinton 2015), a mean.

        The factor T^2 compensates for the smaller gradient of softer targets.
        """
        soft = F.kl_div((logits_BC / self.temperature).log_softmax(dim=1), targets_BC, reduction="batchmean")
        hard = F.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
        return self.weight * self.temperature**2 * soft + (1 - self.weight) * hard
