"""Top-p routing: more experts for harder samples."""

from typing import ClassVar

import torch
from torch import Tensor

from ..distributed import summed, whole_size
from ..options import Option
from .config import RouterConfig, register
from .token_choice import SoftmaxFirstRouter

P = Option(
    "p",
    float,
    0.4,
    "top_p: a sample gets the fewest experts whose gate probabilities sum to at least this.",
    lambda value: None if 0 < value <= 1 else "it must be above 0 and at most 1",
)


@register("top_p", "experts until their probability passes p, more for harder samples (Huang 2024)", options=[P])
class TopPRouter(SoftmaxFirstRouter):
    """Dynamic routing (Huang 2024, "Harder tasks need more experts"): the fewest experts with enough probability.

    A sample gets experts in order of their probability until these sum to p or more, each weighted by its probability:
    one if the gate is certain, up to all if it is not. The paper adds the entropy of each sample's gate to the loss,
    with weight 1e-4 (`balance.entropy_local`), because otherwise the gate would learn to be uncertain and use all
    experts, and the loss of Switch Transformers, with weight 0.01.

    top_k is the number of experts in random warm-up, and the mean number for capacities. mean_experts, saved with the
    model, is the running mean of the number of experts that a training sample chose (momentum 0.1).
    """

    fixed_k = False
    momentum = 0.1
    paper: ClassVar = {"balance.entropy_local": 1e-4}
    mean_experts: Tensor

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.p = config.p
        self.register_buffer("mean_experts", torch.tensor(float(config.top_k)))

    @classmethod
    def only_scales(cls, config: RouterConfig, num_experts: int) -> None:
        """No option does: the gate also decides the number of experts."""

    @property
    def experts_per_sample(self) -> float:
        return self.mean_experts.item()

    def _choose(self, ranked_BE: Tensor) -> Tensor:
        return ranked_BE.argsort(dim=-1, descending=True, stable=True)

    def _wanted(self, weight_BE: Tensor) -> Tensor:
        with torch.no_grad():
            before_BE = weight_BE.cumsum(dim=-1) - weight_BE
            wanted_BE = (before_BE < self.p) & (weight_BE > 0)
            if self.training:
                chosen = summed(wanted_BE.sum().float()) / whole_size(len(wanted_BE))
                self.mean_experts.lerp_(chosen, self.momentum)
        return wanted_BE
