"""The local entropy loss of LIMoE."""

from torch import Tensor

from ..routing import Routing
from .base import log_gate, register


@register(
    "entropy_local",
    "Mean entropy of each sample's gate (LIMoE, Mustafa 2022): makes the gate more certain; does not measure balance.",
)
def entropy_local(routing: Routing) -> Tensor:
    return local_entropy(routing.gate_logits_BE)


def local_entropy(logits_BE: Tensor) -> Tensor:
    """Mean over samples of the entropy of the gate, in nats (Mustafa 2022, LIMoE); 0 if every choice is certain.

    logits_BE: clean logits at the gate's temperature.
    """
    log_BE = log_gate(logits_BE)
    return -(log_BE.exp() * log_BE).sum(dim=-1).mean()
