"""Soft MoE: every expert reads its own mixtures of a sample's tokens."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import Option, count
from ..routing import Assignments, Gate, Routing
from .base import Router
from .config import RouterConfig, register

SLOTS = Option("slots", int, 1, "soft_moe: mixtures of tokens that each expert reads.", count)


@register("soft_moe", "every expert reads its own mixtures of the patch tokens (Puigcerver 2023)", options=[SLOTS])
class SoftMoERouter(Router):
    """Soft MoE (Puigcerver 2023, "From sparse to soft mixtures of experts", sections 2.1 and 2.3).

    Tokens (B, T, D) have logits with P = E * slots learned vectors, both of unit length, times a learned scale.
    Their softmax over the tokens (dispatch) mixes the tokens into P slots, which the experts read; their softmax over
    the slots (combine) mixes the slots' outputs back into T tokens, whose mean is the sample's output. The mean
    over the tokens can equally be taken over the combine weights, so a slot is one assignment: it reads its row of
    rows_AD, its weight is the mean of its combine weights, and the weights of a sample sum to 1.

    Every expert processes every sample, so `warmup` changes nothing. logits_BE are the logarithms of the experts'
    weights, so that their softmax equals the weights.
    """

    token_choice = False
    reads_tokens = True
    warms_up = False
    paper: ClassVar = {"balance.switch": 0.0}

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        if config.capacity_factor is not None:
            raise ValueError("router.kind soft_moe drops nothing: leave out router.capacity_factor")
        if config.hidden:
            raise ValueError("router.kind soft_moe has no gate network: set router.hidden []")
        super().check(config, num_experts)

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.slots = config.slots
        self.slots_DP = nn.Parameter(torch.randn(width, self.num_experts * config.slots) / width**0.5)
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def experts_per_sample(self) -> float:
        return float(self.num_experts * self.slots)

    def mixing(self, tokens_BTD: Tensor, allowed_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dispatch weights (B, T, P), which sum to 1 over the tokens, and combine weights, which sum to 1 over the
        slots.
        """
        slots_DP = self.scale * F.normalize(self.slots_DP, dim=0)
        logits_BTP = F.normalize(tokens_BTD, dim=-1) @ slots_DP / self.temperature
        combine_BTP = logits_BTP
        if allowed_E is not None:
            barred_P = ~allowed_E.repeat_interleave(self.slots)
            combine_BTP = logits_BTP.masked_fill(barred_P, -torch.inf)
        return logits_BTP.softmax(dim=1), combine_BTP.softmax(dim=-1)

    def forward(self, x_BTD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> Routing:
        """Route a batch of token sequences (B, T, D); `allowed_E` gives the other experts no weight."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            tokens_BTD = self.trunk(x_BTD.float())
            dispatch_BTP, combine_BTP = self.mixing(tokens_BTD, allowed_E)
            rows_BPD = dispatch_BTP.transpose(1, 2) @ tokens_BTD
            weight_BP = combine_BTP.mean(dim=1)
        batch, slots = weight_BP.shape
        expert_P = torch.arange(slots, device=x_BTD.device) // self.slots
        share_BE = weight_BP.unflatten(1, (self.num_experts, self.slots)).sum(dim=-1)
        assignments = Assignments.listed(
            torch.arange(batch, device=x_BTD.device).repeat_interleave(slots),
            expert_P.repeat(batch),
            weight_BP.flatten(),
            (batch, self.num_experts),
            rows_AD=rows_BPD.flatten(0, 1),
        )
        logits_BE = share_BE.clamp_min(torch.finfo(share_BE.dtype).tiny).log()
        return Routing(assignments, Gate(logits_BE, logits_BE, target_E=self.target_E, work_E=self.work_E))
