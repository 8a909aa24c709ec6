"""Routers whose logits are their input, and a Routing from plain lists of assignments."""

import torch
from torch import Tensor

from model.balance import BalanceConfig
from model.losses import LOSSES
from model.routers import RouterConfig, build_router
from model.routing import Assignments, Gate, Routing

EVERY_LOSS = BalanceConfig(**{name: float(not loss.of_init) for name, loss in LOSSES.items()})
"""But those that compare the gate with an older one."""


def listed_routing(
    sample_A: Tensor, expert_A: Tensor, weight_A: Tensor, logits_BE: Tensor, top_k: int | None = None, **gate
) -> Routing:
    """gate: other parts of a Gate, at temperature 1."""
    listed = Assignments.listed(sample_A, expert_A, weight_A, tuple(logits_BE.shape), top_k)
    return Routing(listed, Gate(logits_BE, logits_BE, **gate))


def identity_router(kind, num_experts, top_k, **options):
    """A router in evaluation mode whose clean logits equal its input: the gate is the identity."""
    router = build_router(RouterConfig(kind=kind, top_k=top_k, norm="none", **options), num_experts, num_experts)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(num_experts))
        router.gate.bias.zero_()
    return router.eval()
