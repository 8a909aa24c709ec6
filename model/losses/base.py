"""Base of the auxiliary losses, and their weights."""

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
    """Balance: weights of the auxiliary losses; 0: off."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The weight of a loss."""

    def __post_init__(self):
        check_options(self, "balance")


class Loss:
    """An auxiliary loss: a pure function of a Routing, float32, unweighted.

    floor: its value at perfect balance (load and mean gate equal the target), its minimum if the load follows the mean
    gate; may depend on the router. in_warmup: whether it applies to random routing too. needs: a message about what the
    configuration lacks for this loss (None: nothing). of_init: whether it reads the gate of the run that init names.
    """

    def __init__(
        self,
        function: Callable[[Routing], Tensor],
        floor: float | Callable[[Router], float],
        in_warmup: bool,
        needs: Callable[[type[Router], RouterConfig], str | None] | None,
        of_init: bool = False,
    ):
        self.function, self.floor, self.in_warmup, self.needs = function, floor, in_warmup, needs
        self.of_init = of_init
        self.__module__ = function.__module__

    def __call__(self, routing: Routing) -> Tensor:
        return self.function(routing)

    def floor_of(self, router: Router) -> float:
        """The value at perfect balance for this router."""
        return self.floor(router) if callable(self.floor) else self.floor

    def check(self, rule: type[Router], config: RouterConfig) -> None:
        """Raise ValueError if the loss has no effect under this rule."""
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
    of_init: bool = False,
) -> Callable[[Callable[[Routing], Tensor]], Callable[[Routing], Tensor]]:
    """A decorator that registers a function of a Routing as the auxiliary loss `name`, with the option balance.NAME.

    weight: the option's default. floor, in_warmup, needs, of_init: as in Loss. Raises InputError for a registered name.
    """

    def add(function: Callable[[Routing], Tensor]) -> Callable[[Routing], Tensor]:
        option = Option(name, float, weight, help, _weight)
        LOSSES.register(name, help, [option])(Loss(function, floor, in_warmup, needs, of_init))
        return function

    return add


def _weight(value: float) -> str | None:
    return None if 0 <= value <= LARGEST else f"a loss weight must be from 0 to {LARGEST:g}"


def squared_cv(values_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer 2017, eq. 7); 0 at balance.

    target_E: target shares, summing to 1, instead of even ones: sum_i t_i (share_i / t_i - 1)^2, which is the same for
    t_i = 1 / E. A sum of zero gives 0.
    """
    if target_E is None:
        target_E = torch.full_like(values_E, 1 / len(values_E))
    ratio_E = values_E / target_E  # its mean under the target is the sum of the values
    total = values_E.sum()
    # Divide before squaring, and never by less than this, to stay in the range of float32.
    return (target_E * ((ratio_E - total) / total.clamp_min(1e-30)).square()).sum()


def log_gate(logits_BE: Tensor) -> Tensor:
    """log_softmax over the experts, (B, E), with a large negative number, not minus infinity, for excluded experts.

    Entropies use it: a probability that underflows to 0 still has a finite logarithm with the right gradient.
    """
    return logits_BE.log_softmax(dim=-1).clamp_min(torch.finfo(logits_BE.dtype).min)
