"""The global entropy loss of LIMoE."""

import math

import torch
from torch import Tensor

from ..routing import Routing
from .base import log_gate, register


@register(
    "entropy_global",
    "Divergence of the mean gate from the target load, log E minus its entropy (LIMoE): balances the mean gate.",
)
def entropy_global(routing: Routing) -> Tensor:
    return global_divergence(routing.gate_logits_BE, routing.gate.target_E)


def global_divergence(logits_BE: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Divergence, in nats, of the mean gate from the target load; 0 at perfect balance.

    For an even target this is log E minus the entropy of the mean gate, which LIMoE (Mustafa 2022) maximises.
    logits_BE: clean logits at the gate's temperature.
    """
    log_mean_E = log_gate(logits_BE).logsumexp(dim=0) - math.log(len(logits_BE))
    target_E = torch.full_like(log_mean_E, 1 / len(log_mean_E)) if target_E is None else target_E
    return (log_mean_E.exp() * (log_mean_E - target_E.log())).sum()
