"""Sinkhorn routing: balance by optimal transport."""

from typing import ClassVar

import torch
from torch import Tensor

from ..distributed import gathered, whole_size
from ..options import Option, count
from .config import RouterConfig, register
from .token_choice import SoftmaxFirstRouter

ITERATIONS = Option(
    "sinkhorn_iterations",
    int,
    16,
    "sinkhorn: number of normalisation iterations in a training step; logits with a wider spread need more.",
    count,
)


@register(
    "sinkhorn",
    "top-k after the batch's gate has been normalised to even loads, plain top-k in evaluation (Clark 2022)",
    options=[ITERATIONS],
)
class SinkhornRouter(SoftmaxFirstRouter):
    """Sinkhorn assignment (S-BASE, Clark 2022; BASE, Lewis 2021; the variant of Megatron-LM).

    In training the choice is the top-k of the transport plan between the samples of the batch and the experts: the
    matrix of exp(logits at the temperature), its rows and columns scaled in turn until each sample has the same mass
    and each expert its target load. Scaling a row changes no choice in it, so the plan gives the same order as logits +
    the logarithms of the columns' scales, `column_scales`. Weights come only from the gate, as in Megatron-LM: its
    sigmoid for k = 1, else its softmax over all experts.

    The plan is balanced. For k = 1, as in the papers, the loads are also approximately even, without an auxiliary loss.
    For larger k they need not be: an expert that is the second choice of every sample stays the second choice.

    So **training depends on the batch**, evaluation does not: it is plain top-k of the logits. A batch with fewer
    choices than experts is also routed that way.
    """

    paper: ClassVar = {"balance.switch": 0.0}

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.iterations = config.sinkhorn_iterations

    def _ranked(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        ranked_BE = super()._ranked(scores_BE, logits_BE)
        if not self.training or whole_size(len(ranked_BE)) * self.top_k < self.num_experts:
            return ranked_BE
        tempered_BE = ranked_BE.detach() / self.temperature
        return tempered_BE + column_scales(gathered(tempered_BE), self.target_E, self.iterations)

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        if self.top_k == 1:
            return (scores_BE.gather(-1, expert_BK) / self.temperature).sigmoid()
        return super()._weights(scores_BE, expert_BK, placed_BK)


@torch.no_grad()
def column_scales(logits_BE: Tensor, target_E: Tensor, iterations: int) -> Tensor:
    """Logarithms (E,) of the scales of the columns of exp(logits) for which columns sum to the target and rows to 1 /
    B.

    Sinkhorn's algorithm (Sinkhorn and Knopp 1967) in logarithms. target_E: sums to 1. Returns 0 for an expert that no
    sample may choose.
    """
    log_target_E, scale_E = target_E.log(), torch.zeros_like(target_E)
    for _ in range(iterations):
        row_B1 = -(logits_BE + scale_E).logsumexp(dim=1, keepdim=True)
        column_E = (logits_BE + row_B1).logsumexp(dim=0)
        scale_E = torch.where(column_E.isfinite(), log_target_E - column_E, 0.0)
    return scale_E
