"""The auxiliary losses of a Routing, and their weighted sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import LOSSES, BalanceConfig
from .routers import Router, Routing

__all__ = ["BalanceConfig", "balance_losses", "floors", "losses_by_place", "weighted_sum"]


def balance_losses(routing: Routing, config: BalanceConfig) -> dict[str, Tensor]:
    """All auxiliary losses with non-zero weight by name, unweighted, as float32 scalars.

    In random warm-up only losses that suit it, such as the z-loss: balancing random choices would teach the gate
    noise.
    """
    return {
        name: loss(routing)
        for name, loss in LOSSES.items()
        if getattr(config, name) > 0 and (routing.learned or loss.in_warmup)
    }


def losses_by_place(routings: Sequence[Routing], config: BalanceConfig) -> dict[str, Tensor]:
    """`balance_losses` of the routing at each of L places, by name (L,)."""
    each = [balance_losses(routing, config) for routing in routings]
    return {name: torch.stack([losses[name] for losses in each]) for name in each[0]}


def floors(config: BalanceConfig, router: Router) -> dict[str, float]:
    """The value of each auxiliary loss with non-zero weight at perfect balance, to subtract from its reading.

    It is the minimum of the loss if the load follows the mean gate. At perfect balance load and mean gate equal the
    target (p_penalty: inversely proportional to the cost; usage_variance: even). The z-loss and the local entropy do
    not measure balance; their minimum is 0.
    """
    return {name: loss.floor_of(router) for name, loss in LOSSES.items() if getattr(config, name) > 0}


def weighted_sum(losses: dict[str, Tensor], config: BalanceConfig) -> Tensor | float:
    """The weighted sum of the losses, each averaged over places if there are several; 0 if there is none."""
    return sum(getattr(config, name) * loss.mean() for name, loss in losses.items())
