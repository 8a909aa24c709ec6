"""What auxiliary losses are made of, and their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..options import Option, check_options
from ..registry import Registry
from ..routers import Router, RouterConfig
from ..routers.config import LARGEST
from ..routing import Routing


@dataclass
class BalanceConfig:
    """Balance: weights of the auxiliary losses; 0 leaves one out. One field for each registered loss."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The weight of a loss."""

    def __post_init__(self):
        check_options(self, "balance")


class Loss:
    """An auxiliary loss: a pure function of a Routing, float32, unweighted.

    floor: its value at perfect balance, the least that it can be where the load follows the mean gate; load and mean
    gate are then the target. May depend on the router. in_warmup: whether it is for random routing too. needs: which
    part of a configuration lacks something that the loss acts on, and what to set (None: nothing is lacking).
    """

    def __init__(
        self,
        function: Callable[[Routing], Tensor],
        floor: float | Callable[[Router], float],
        in_warmup: bool,
        needs: Callable[[type[Router], RouterConfig], str | None] | None,
    ):
        self.function, self.floor, self.in_warmup, self.needs = function, floor, in_warmup, needs
        self.__module__ = function.__module__

    def __call__(self, routing: Routing) -> Tensor:
        return self.function(routing)

    def floor_of(self, router: Router) -> float:
        """The value at perfect balance for this router."""
        return self.floor(router) if callable(self.floor) else self.floor

    def check(self, rule: type[Router], config: RouterConfig) -> None:
        """Raise ValueError where the rule gives the loss nothing to act on."""
        if self.needs is not None and (lacking := self.needs(rule, config)):
            raise ValueError(lacking)


LOSSES: Registry[Loss] = Registry("auxiliary loss", BalanceConfig)
"""The auxiliary losses by name."""


def register(
    name: str,
    help: str,
    weight: float = 0.0,
    floor: float | Callable[[Router], float] = 0.0,
    in_warmup: bool = False,
    needs: Callable[[type[Router], RouterConfig], str | None] | None = None,
) -> Callable[[Callable[[Routing], Tensor]], Callable[[Routing], Tensor]]:
    """A decorator that registers a function of a Routing as the auxiliary loss `name`, with the option balance.NAME.

    weight: the option's default. floor, in_warmup, needs: as in Loss. Raises InputError for a name that is taken.
    """

    def add(function: Callable[[Routing], Tensor]) -> Callable[[Routing], Tensor]:
        option = Option(name, float, weight, help, _weight)
        LOSSES.register(name, help, [option])(Loss(function, floor, in_warmup, needs))
        return function

    return add


def _weight(value: float) -> str | None:
    return None if 0 <= value <= LARGEST else f"a loss weight is from 0 to {LARGEST:g}"


def squared_cv(values_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer 2017, eq. 7); 0 at balance.

    target_E: shares, summing to 1, that balance means instead of even ones: sum_i t_i (share_i / t_i - 1)^2, which for
    t_i = 1 / E is the same. A sum of zero gives 0.
    """
    if target_E is None:
        target_E = torch.full_like(values_E, 1 / len(values_E))
    ratio_E = values_E / target_E  # its mean under the target is the sum of the values
    total = values_E.sum()
    # Divided before it is squared, and never by less than this, or small sums would leave the range of float32.
    return (target_E * ((ratio_E - total) / total.clamp_min(1e-30)).square()).sum()


def log_gate(logits_BE: Tensor) -> Tensor:
    """log_softmax over the experts, (B, E), with a very negative number for the minus infinity of a barred expert.

    Entropies are computed from it: a probability that underflows to 0 has a logarithm, whose gradient is right.
    """
    return logits_BE.log_softmax(dim=-1).clamp_min(torch.finfo(logits_BE.dtype).min)
