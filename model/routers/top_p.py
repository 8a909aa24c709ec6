"""Top-p routing: as many experts as a sample needs."""

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
    "top_p: a sample's experts are the fewest whose gate probabilities sum to at least this.",
    lambda value: None if 0 < value <= 1 else "it is a probability above 0",
)


@register("top_p", "experts until their probability passes p, more for harder samples (Huang 2024)", options=[P])
class TopPRouter(SoftmaxFirstRouter):
    """Dynamic routing (Huang 2024, "Harder tasks need more experts"): the fewest experts that the gate trusts.

    In the order of their probability a sample gets experts until these sum to p or more, each weighted by its
    probability: one where the gate is sure, up to all where it is not. The paper adds the entropy of each sample's gate
    to the loss, times 1e-4 (`balance.entropy_local`), or the gate would learn to be unsure and use all of them, and
    Switch's loss, times 0.01.

    top_k is the number of experts of random warm-up, and the mean number that capacities are made for. mean_experts,
    saved with the model, is the running mean of the number of experts a training sample chose (momentum 0.1).
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
        """No option does: how many experts a sample has depends on it."""

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
