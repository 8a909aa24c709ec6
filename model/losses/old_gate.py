"""The distance to the gate at the start of training."""

import torch
from torch import Tensor

from ..errors import InputError
from ..routers import Router, RouterConfig
from ..routing import Routing
from .base import log_gate, register


def _gate(rule: type[Router], config: RouterConfig) -> str | None:
    if rule.learns and not rule.reads_tokens:
        return None
    return f"balance.old_gate needs a trainable gate, which router.kind {config.kind} does not have: set it to 0"


@register(
    "old_gate",
    "Distance to the gate of the run that init names, on the same images (KL divergence of the gates): keeps a gate "
    "from sending a narrow domain to a few experts. It does not measure balance.",
    in_warmup=True,
    needs=_gate,
    of_init=True,
)
def old_gate_distance(routing: Routing) -> Tensor:
    """Mean over samples of the Kullback-Leibler divergence of the gate from the old one (Hinton 2015, Li 2016).

    sum_e p_e log(p_e / q_e), where p is the old gate and q the new gate over the old experts, both at the gate's
    temperature; 0 while they are equal. Raises InputError for a Routing without an old gate.
    """
    old_BE = routing.gate.old_BE
    if old_BE is None:
        raise InputError("balance.old_gate needs an old gate to compare with: call hold_old_gates on the trained model")
    return gate_divergence(old_BE, routing.gate_logits_BE[:, : old_BE.shape[1]])


def gate_divergence(old_BE: Tensor, new_BE: Tensor) -> Tensor:
    """Mean over samples of the KL divergence of softmax(new) from softmax(old), from their logits."""
    old_BE, new_BE = log_gate(old_BE), log_gate(new_BE)
    return torch.mul(old_BE.exp(), old_BE - new_BE).sum(dim=-1).mean()
