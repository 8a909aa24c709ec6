"""Expert choice: each expert takes its best samples."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..distributed import gathered, own_rows, rows_before
from ..routing import Assignments, Drops, Routing
from .base import GatedRouter
from .capacity import exact, expert_capacity
from .config import RouterConfig, register


@register("expert_choice", "each expert takes its best samples (Zhou 2022)")
class ExpertChoiceRouter(GatedRouter):
    """Expert choice (Zhou 2022, "Mixture-of-experts with expert choice routing", eq. 1-2).

    The gate is a softmax over the experts; expert i takes the C_i = ceil(B c t_i) samples of a batch with its largest
    gate values, which are their weights. c is capacity_factor (null: top_k), the mean number of experts per sample; t
    the target load, even by default, so the load is balanced without a loss.

    So **training depends on the batch**: the number of a sample's experts, which may be 0, depends on the other
    samples. Evaluation does not: an expert takes every sample whose gate reaches threshold_E, the running mean
    (momentum 0.1, as in BatchNorm) of the smallest gate value it took in training; a sample that no expert takes goes
    to the expert with its largest gate value. Random warm-up draws top_k experts per sample and does not change
    thresholds.
    """

    token_choice = False
    momentum = 0.1
    paper: ClassVar = {"balance.switch": 0.0}
    threshold_E: Tensor

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.per_sample = float(config.top_k if config.capacity_factor is None else config.capacity_factor)
        # Below every gate value: before training, all experts take all samples.
        self.register_buffer("threshold_E", torch.zeros(self.num_experts))

    @torch.no_grad()
    def close_to(self, new_E: Tensor, old_E: Tensor) -> None:
        """See GatedRouter; no gate value reaches a threshold of 1, which falls as new experts take samples."""
        super().close_to(new_E, old_E)
        self.threshold_E[new_E] = 1.0

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        super().check(config, num_experts)
        if config.capacity_factor is not None and config.capacity_factor > num_experts:
            raise ValueError(
                f"router.capacity_factor {config.capacity_factor} with kind expert_choice is the mean number of "
                f"experts per sample, but there are only {num_experts}: lower it"
            )

    @property
    def experts_per_sample(self) -> float:
        return self.per_sample

    def _route(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> Routing:
        gate_BE = (logits_BE / self.temperature).softmax(dim=-1)
        if self.training:
            return self._take_best(logits_BE, gate_BE)
        taken_BE = (gate_BE >= self.threshold_E) & (logits_BE > -math.inf)
        best_BE = torch.zeros_like(taken_BE).scatter_(1, gate_BE.argmax(dim=-1, keepdim=True), True)
        sample_A, expert_A = (taken_BE | (best_BE & ~taken_BE.any(dim=-1, keepdim=True))).nonzero(as_tuple=True)
        chosen = Assignments.listed(
            sample_A, expert_A, gate_BE[sample_A, expert_A], (gate_BE.shape[0], self.num_experts)
        )
        return Routing(chosen, self._gate(logits_BE))

    def _take_best(self, logits_BE: Tensor, gate_BE: Tensor) -> Routing:
        batch, before = len(gate_BE), rows_before(len(gate_BE))
        whole_BE = gathered(gate_BE)  # of the whole batch of all processes
        places = expert_capacity(len(whole_BE), exact(self.per_sample), self.shares)
        value_PE, sample_PE = whole_BE.topk(max(places), dim=0)
        columns = range(self.num_experts)
        sample_A = torch.cat([sample_PE[: places[e], e] for e in columns])
        weight_A = torch.cat([value_PE[: places[e], e] for e in columns])
        expert_A = torch.cat([torch.full((places[e],), e, device=sample_A.device) for e in columns])
        with torch.no_grad():
            smallest_E = torch.stack([value_PE[places[e] - 1, e] for e in columns])
            self.threshold_E.lerp_(smallest_E, self.momentum)
            unseen_B = torch.ones(len(whole_BE), dtype=torch.int64, device=sample_A.device).index_fill(0, sample_A, 0)
            unseen_B = own_rows(unseen_B)
        if batch < len(whole_BE):  # a varying number of the selected samples belongs to this process
            own_A = (sample_A >= before) & (sample_A < before + batch)
            sample_A, expert_A, weight_A = sample_A[own_A] - before, expert_A[own_A], weight_A[own_A]
        taken = Assignments.listed(sample_A, expert_A, weight_A, (batch, self.num_experts))
        return Routing(taken, self._gate(logits_BE), Drops(unseen_B.sum()))
