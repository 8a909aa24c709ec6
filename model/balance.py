"""Auxiliary losses that keep the experts in use: pure functions of a Routing, and their weighted sum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.routers import Routing


@dataclass
class BalanceConfig:
    """Balance: weights of the auxiliary losses; 0 leaves one out."""

    switch: float = 0.01
    """Load-balancing loss of Switch Transformers: E * sum of load share * mean gate probability."""
    importance: float = 0.0
    """Squared coefficient of variation of the gate weight that each expert receives (Shazeer 2017)."""
    load: float = 0.0
    """Squared coefficient of variation of the smooth load estimate (Shazeer 2017); needs router.kind noisy_topk."""
    z_loss: float = 0.0
    """Router z-loss (ST-MoE, which uses 1e-3): keeps the router's logits small."""
    usage_variance: float = 0.0
    """The reference recipe's variance of the usage fractions: reported, but it has no gradient and balances nothing."""

    def __post_init__(self):
        for name, weight in vars(self).items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"balance.{name} is {weight}: a loss weight is finite and not negative")


def squared_cv(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer 2017, eq. 7); 0 at balance.

    A sum of zero gives 0.
    """
    mean = values_E.mean()
    return values_E.var(correction=0) / (mean * mean).clamp_min(torch.finfo(values_E.dtype).tiny)


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the gate weight summed over the batch (Shazeer 2017, eq. 6-7); 0 at perfect balance."""
    return squared_cv(routing.importance_E)


def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the smooth load estimate (Shazeer 2017, eq. 10-11); 0 at perfect balance.

    0 where the rule had no noise (evaluation, warm-up): a hard count has no gradient.
    """
    if routing.load_BE is None:
        return torch.zeros((), device=routing.logits_BE.device)
    return squared_cv(routing.load_BE.sum(dim=0))


def switch_balance(probs_BE: Tensor, counts_E: Tensor) -> Tensor:
    """Load-balancing loss of Switch Transformers (Fedus 2021, eq. 4-6), for any k; 1.0 at perfect balance.

    probs_BE: softmax of the clean router logits. counts_E: samples sent to each expert before any capacity
    drop; carries no gradient. Load is counted as a share of all assignments, so that k does not matter.
    """
    share_E = counts_E / counts_E.sum().clamp_min(1)
    return len(share_E) * (share_E * probs_BE.mean(dim=0)).sum()


def z_loss(logits_BE: Tensor) -> Tensor:
    """Mean over samples of logsumexp(logits)^2 (Zoph 2022, ST-MoE, eq. 5); log(E)^2 for equal zero logits."""
    return logits_BE.logsumexp(dim=-1).square().mean()


def usage_variance(counts_E: Tensor) -> Tensor:
    """Population variance of the usage fractions (the reference recipe); 0 at perfect balance.

    It is built from counts and has no gradient: kept to reproduce that recipe, it balances nothing.
    """
    return (counts_E / counts_E.sum().clamp_min(1)).var(correction=0)


def balance_losses(routing: Routing, config: BalanceConfig) -> dict[str, Tensor]:
    """Every auxiliary loss of non-zero weight by name, unweighted, as float32 scalars.

    Of random warm-up routing only the z-loss: to balance a draw that the gate did not make would teach it noise.
    """
    functions = {
        "switch": lambda: switch_balance(routing.probs_BE, routing.counts_E),
        "importance": lambda: importance_loss(routing),
        "load": lambda: load_loss(routing),
        "z_loss": lambda: z_loss(routing.logits_BE),
        "usage_variance": lambda: usage_variance(routing.counts_E),
    }
    names = functions if routing.learned else ["z_loss"]
    return {name: functions[name]() for name in names if getattr(config, name) > 0}


def weighted_sum(losses: dict[str, Tensor], config: BalanceConfig) -> Tensor | float:
    """What the losses of `balance_losses` add to the training loss; 0 where there is none."""
    return sum(getattr(config, name) * loss for name, loss in losses.items())
