"""MixtureOfExperts: router, experts, dispatch and usage counters."""

import torch
from torch import Tensor, nn

from model.dispatch import COMBINE, dispatch
from model.experts import ExpertsConfig, build_experts
from model.routers import RouterConfig, Routing, build_router


class MixtureOfExperts(nn.Module):
    """Features (B, D) -> class logits (B, C), each sample through a few of E unequal experts.

    usage_E and warmup_usage_E count, as int64 buffers that are saved with the model, how many training
    samples each expert received from the learned gate and from random warm-up. They are kept apart
    because even random routing would hide a collapsed gate.
    """

    def __init__(self, in_features: int, num_classes: int, router: RouterConfig, experts: ExpertsConfig):
        super().__init__()
        num_experts = len(experts.sizes)
        self.router = build_router(router, in_features, num_experts)
        self.experts = build_experts(experts, in_features, num_classes)
        self.combine, self.how = COMBINE[experts.combine], experts.dispatch
        self.register_buffer("usage_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("warmup_usage_E", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Logits (B, C) in float32 and the routing; `warmup` routes at random, `allowed_E` bars experts."""
        routing = self.router(x_BD, warmup, allowed_E)
        if self.training:
            self._count(routing)
        outputs_AC, order_A = dispatch(x_BD, routing, self.experts, self.how)
        return self.combine(outputs_AC, order_A, routing), routing

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        counter_E = self.usage_E if routing.learned else self.warmup_usage_E
        counter_E += routing.counts_E
