"""The auxiliary losses of a Routing, and their weighted sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import LOSSES, BalanceConfig
from .routers import Router, Routing

__all__ = ["BalanceConfig", "balance_losses", "floors", "losses_by_place", "weighted_sum"]


def balance_losses(routing: Routing, config: BalanceConfig) -> dict[str, Tensor]:
    """Every auxiliary loss of non-zero weight by name, unweighted, as float32 scalars.

    Of random warm-up routing only what is for it, such as the z-loss: to balance a draw that the gate did not make
    would teach it noise.
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
    """For each auxiliary loss of non-zero weight its value at perfect balance: what to subtract to read it.

    It is the least that the loss can be where the load follows the mean gate. Perfect balance: load and mean gate
    are the target (p_penalty: in proportion to one over the cost; usage_variance, which knows no target: even). The
    z-loss and the local entropy measure no balance, and are 0 at the least.
    """
    return {name: loss.floor_of(router) for name, loss in LOSSES.items() if getattr(config, name) > 0}


def weighted_sum(losses: dict[str, Tensor], config: BalanceConfig) -> Tensor | float:
    """What losses add to the training loss, by their mean where there are several places; 0 where there is none."""
    return sum(getattr(config, name) * loss.mean() for name, loss in losses.items())
