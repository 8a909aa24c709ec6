"""Knowledge distillation: the task loss where trained models teach a smaller one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.moe_vit import AnyMoE


class Teacher:
    """One or more trained models, whose answers to a batch are a student's targets beside the labels.

    They read what the student reads, in evaluation mode. The target is the mean of their class probabilities at
    `temperature`; `weight` is its share of the loss, the rest is that of the labels.
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

        T^2 keeps the size of the gradient, which softer targets make smaller by as much.
        """
        soft = F.kl_div((logits_BC / self.temperature).log_softmax(dim=1), targets_BC, reduction="batchmean")
        hard = F.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
        return self.weight * self.temperature**2 * soft + (1 - self.weight) * hard
