"""The load loss."""

import torch
from torch import Tensor

from ..routers import Router, RouterConfig
from ..routing import Routing
from .base import register, squared_cv


def _noise(rule: type[Router], config: RouterConfig) -> str | None:
    remedy = rule.lacks_load(config)
    return remedy and (
        f"balance.load needs noise on the logits, which router.kind {config.kind} does not have here: set it to 0, or "
        f"{remedy}"
    )


@register(
    "load",
    "Squared coefficient of variation of the smooth load estimate (Shazeer 2017); needs a rule with noise on its "
    "logits, such as noisy_topk, vmoe or hierarchical.",
    needs=_noise,
)
def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the smooth load estimate (Shazeer 2017, eq. 10-11); 0 at perfect balance.

    0 without noise (evaluation, warm-up): a hard count has no gradient.
    """
    gate = routing.gate
    if gate.load_BE is None:
        return torch.zeros((), device=gate.logits_BE.device)
    return squared_cv(gate.load_BE.sum(dim=0), gate.target_E)
