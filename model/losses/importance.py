"""The importance loss."""

from torch import Tensor

from ..routing import Routing
from .base import register, squared_cv


@register(
    "importance",
    "Squared coefficient of variation of the gate weight that each expert receives (Shazeer 2017).",
)
def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the importance summed over the batch (Shazeer 2017, eq. 6-7); 0 at perfect balance.

    In V-MoE importance is the sum of the noise-free gates over all experts (Riquelme 2021, appendix A); in Shazeer 2017
    it is the sum of the weights.
    """
    gate = routing.gate
    importance_E = routing.importance_E if gate.importance_BE is None else gate.importance_BE.sum(dim=0)
    return squared_cv(importance_E, gate.target_E)
