"""The load-balancing loss of Switch Transformers and GShard."""

from torch import Tensor

from ..routing import Routing
from .base import register


@register(
    "switch",
    "Load-balancing loss of Switch Transformers and GShard: E * sum of load share * mean gate probability.",
    weight=0.01,
    floor=1.0,
)
def switch(routing: Routing) -> Tensor:
    return switch_balance(routing.probs_BE, routing.demand_E, routing.gate.target_E)


def switch_balance(probs_BE: Tensor, counts_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Load-balancing loss of Switch Transformers (Fedus 2021, eq. 4-6), for any k; 1.0 at perfect balance.

    probs_BE: softmax of the clean router logits at their temperature. counts_E: samples sent to each expert before any
    capacity drop; carries no gradient. Load is counted as a share of all assignments, so that k does not matter.
    target_E: target load instead of 1 / E each: sum_i share_i * probability_i / t_i, 1.0 if both equal the target.
    """
    share_E = counts_E / counts_E.sum().clamp_min(1)
    if target_E is None:
        return len(share_E) * (share_E * probs_BE.mean(dim=0)).sum()
    return (share_E * probs_BE.mean(dim=0) / target_E).sum()
