"""The router z-loss."""

from torch import Tensor

from ..routers import Router, RouterConfig
from ..routing import Routing
from .base import register


def _logits(rule: type[Router], config: RouterConfig) -> str | None:
    if rule.learns and not rule.reads_tokens:
        return None
    return f"balance.z_loss needs logits, which router.kind {config.kind} does not have: set it to 0"


@register(
    "z_loss",
    "Router z-loss (ST-MoE, which uses 1e-3): keeps the router's logits small. It does not measure balance.",
    in_warmup=True,
    needs=_logits,
)
def router_z_loss(routing: Routing) -> Tensor:
    return z_loss(routing.logits_BE)


def z_loss(logits_BE: Tensor) -> Tensor:
    """Mean over samples of logsumexp(logits)^2 (Zoph 2022, ST-MoE, eq. 5); log(E)^2 for equal zero logits."""
    return logits_BE.logsumexp(dim=-1).square().mean()
