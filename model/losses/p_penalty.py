"""The parameter penalty of HMoE."""

import torch
from torch import Tensor

from ..routers import Router
from ..routing import Routing
from .base import register


def _floor(router: Router) -> float:
    return len(router.work) / sum(1 / cost for cost in router.work)


@register(
    "p_penalty",
    "Parameter penalty of HMoE (Wang 2024): the switch loss with each expert's load weighted by its cost, which "
    "balances the work and prefers small experts. It ignores router.target_load.",
    floor=_floor,
)
def p_penalty(routing: Routing) -> Tensor:
    work_E = routing.gate.work_E
    return parameter_penalty(
        routing.probs_BE, routing.demand_E, torch.ones_like(routing.logits_BE[0]) if work_E is None else work_E
    )


def parameter_penalty(probs_BE: Tensor, counts_E: Tensor, work_E: Tensor) -> Tensor:
    """P-penalty of HMoE (Wang 2024): E * sum_i M_i P_i, M_i the load times the expert's cost over the mean cost.

    work_E: cost of each expert over their mean. As in `switch_balance` load is a share of all assignments (the paper's
    is a share of the samples: k times as much). Minimum E / sum_i (1 / work_i), at equal work (load and probability in
    proportion to 1 / work_i); 1.0 for experts of equal cost.
    """
    share_E = counts_E / counts_E.sum().clamp_min(1)
    return len(share_E) * (share_E * work_E * probs_BE.mean(dim=0)).sum()
