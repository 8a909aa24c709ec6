"""Auxiliary losses that keep the experts in use: pure functions of a Routing, and their weighted sum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .routers import Router, Routing

LARGEST = 1e6  # weight of a loss, far inside float32


@dataclass
class BalanceConfig:
    """Balance: weights of the auxiliary losses; 0 leaves one out."""

    switch: float = 0.01
    """Load-balancing loss of Switch Transformers and GShard: E * sum of load share * mean gate probability."""
    importance: float = 0.0
    """Squared coefficient of variation of the gate weight that each expert receives (Shazeer 2017)."""
    load: float = 0.0
    """Squared coefficient of variation of the smooth load estimate (Shazeer 2017); needs a rule with noise on its
    logits: noisy_topk, vmoe or hierarchical."""
    p_penalty: float = 0.0
    """Parameter penalty of HMoE (Wang 2024): the switch loss with each expert's load weighted by its cost, so that it
    evens the work and prefers small experts. It does not look at router.target_load."""
    z_loss: float = 0.0
    """Router z-loss (ST-MoE, which uses 1e-3): keeps the router's logits small."""
    entropy_local: float = 0.0
    """Mean entropy of each sample's gate (LIMoE, Mustafa 2022): makes choices decided."""
    entropy_global: float = 0.0
    """Divergence of the mean gate from the target load, log E less its entropy (LIMoE): evens the mean gate."""
    usage_variance: float = 0.0
    """The reference recipe's variance of the usage fractions: reported, but it has no gradient and balances nothing."""

    def __post_init__(self):
        for name, weight in vars(self).items():
            if not 0 <= weight <= LARGEST:
                raise ValueError(f"balance.{name} is {weight}: a loss weight is from 0 to {LARGEST:g}")


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


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the importance summed over the batch (Shazeer 2017, eq. 6-7); 0 at perfect balance.

    V-MoE's importance is that of the clean gates over all experts (Riquelme 2021, appendix A), Shazeer's that of the
    weights.
    """
    gate = routing.gate
    importance_E = routing.importance_E if gate.importance_BE is None else gate.importance_BE.sum(dim=0)
    return squared_cv(importance_E, gate.target_E)


def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the smooth load estimate (Shazeer 2017, eq. 10-11); 0 at perfect balance.

    0 where the rule had no noise (evaluation, warm-up): a hard count has no gradient.
    """
    gate = routing.gate
    if gate.load_BE is None:
        return torch.zeros((), device=gate.logits_BE.device)
    return squared_cv(gate.load_BE.sum(dim=0), gate.target_E)


def switch_balance(probs_BE: Tensor, counts_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Load-balancing loss of Switch Transformers (Fedus 2021, eq. 4-6), for any k; 1.0 at perfect balance.

    probs_BE: softmax of the clean router logits at their temperature. counts_E: samples sent to each expert before any
    capacity drop; carries no gradient. Load is counted as a share of all assignments, so that k does not matter.
    target_E: the load to aim at instead of 1 / E each: sum_i share_i * probability_i / t_i, 1.0 where both are the
    target.
    """
    share_E = counts_E / counts_E.sum().clamp_min(1)
    if target_E is None:
        return len(share_E) * (share_E * probs_BE.mean(dim=0)).sum()
    return (share_E * probs_BE.mean(dim=0) / target_E).sum()


def parameter_penalty(probs_BE: Tensor, counts_E: Tensor, work_E: Tensor) -> Tensor:
    """P-penalty of HMoE (Wang 2024): E * sum_i M_i P_i, M_i the load times the expert's cost over the mean cost.

    work_E: cost of each expert over their mean. As in `switch_balance` load is a share of all assignments (the paper's
    is a share of the samples: k times as much). Least, E / sum_i (1 / work_i), where load and probability both
    are in proportion to 1 / work_i, that is, at equal work; 1.0 for experts of equal cost.
    """
    share_E = counts_E / counts_E.sum().clamp_min(1)
    return len(share_E) * (share_E * work_E * probs_BE.mean(dim=0)).sum()


def z_loss(logits_BE: Tensor) -> Tensor:
    """Mean over samples of logsumexp(logits)^2 (Zoph 2022, ST-MoE, eq. 5); log(E)^2 for equal zero logits."""
    return logits_BE.logsumexp(dim=-1).square().mean()


def log_gate(logits_BE: Tensor) -> Tensor:
    """log_softmax over the experts, (B, E), with a very negative number for the minus infinity of a barred expert.

    Entropies are computed from it: a probability that underflows to 0 has a logarithm, whose gradient is right.
    """
    return logits_BE.log_softmax(dim=-1).clamp_min(torch.finfo(logits_BE.dtype).min)


def local_entropy(logits_BE: Tensor) -> Tensor:
    """Mean over samples of the entropy of the gate, in nats (Mustafa 2022, LIMoE); 0 where every choice is certain.

    logits_BE: clean logits at the gate's temperature.
    """
    log_BE = log_gate(logits_BE)
    return -(log_BE.exp() * log_BE).sum(dim=-1).mean()


def global_divergence(logits_BE: Tensor, target_E: Tensor | None = None) -> Tensor:
    """Divergence, in nats, of the mean gate from the target load; 0 at perfect balance.

    For an even target log E less the entropy of the mean gate, which LIMoE (Mustafa 2022) maximises. logits_BE: clean
    logits at the gate's temperature.
    """
    log_mean_E = log_gate(logits_BE).logsumexp(dim=0) - math.log(len(logits_BE))
    target_E = torch.full_like(log_mean_E, 1 / len(log_mean_E)) if target_E is None else target_E
    return (log_mean_E.exp() * (log_mean_E - target_E.log())).sum()


def usage_variance(counts_E: Tensor) -> Tensor:
    """Population variance of the usage fractions (the reference recipe); 0 at perfect balance.

    It is built from counts and has no gradient: kept to reproduce that recipe, it balances nothing.
    """
    return (counts_E / counts_E.sum().clamp_min(1)).var(correction=0)


def balance_losses(routing: Routing, config: BalanceConfig) -> dict[str, Tensor]:
    """Every auxiliary loss of non-zero weight by name, unweighted, as float32 scalars.

    Of random warm-up routing only the z-loss: to balance a draw that the gate did not make would teach it noise.
    """
    demand_E, target_E = routing.demand_E, routing.gate.target_E
    functions = {
        "switch": lambda: switch_balance(routing.probs_BE, demand_E, target_E),
        "importance": lambda: importance_loss(routing),
        "load": lambda: load_loss(routing),
        "p_penalty": lambda: parameter_penalty(routing.probs_BE, demand_E, routing.gate.work_E),
        "z_loss": lambda: z_loss(routing.logits_BE),
        "entropy_local": lambda: local_entropy(routing.gate_logits_BE),
        "entropy_global": lambda: global_divergence(routing.gate_logits_BE, target_E),
        "usage_variance": lambda: usage_variance(demand_E),
    }
    names = functions if routing.learned else ["z_loss"]
    return {name: functions[name]() for name in names if getattr(config, name) > 0}


def floors(config: BalanceConfig, router: Router) -> dict[str, float]:
    """For each auxiliary loss of non-zero weight its value at perfect balance: what to subtract to read it.

    It is the least that the loss can be where the load follows the mean gate. Perfect balance: load and mean gate
    are the target (p_penalty: in proportion to one over the cost; usage_variance, which knows no target: even). The
    z-loss and the local entropy measure no balance, and are 0 at the least.
    """
    values = {
        **dict.fromkeys(("importance", "load", "z_loss", "entropy_local", "entropy_global", "usage_variance"), 0.0),
        "switch": 1.0,
        "p_penalty": len(router.work) / sum(1 / cost for cost in router.work),
    }
    return {name: values[name] for name, weight in vars(config).items() if weight > 0}


def weighted_sum(losses: dict[str, Tensor], config: BalanceConfig) -> Tensor | float:
    """What the losses of `balance_losses` add to the training loss; 0 where there is none."""
    return sum(getattr(config, name) * loss for name, loss in losses.items())
