"""RouterConfig: the options of every routing rule."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from ..options import WIDEST, check_options, share
from ..registry import Registry
from .capacity import exact

if TYPE_CHECKING:
    from .base import Router

LARGEST, SMALLEST = 1e6, 1e-6
"""Bounds of factors on logits, so that results stay in the range of float32."""


def zero_or_moderate(value: float | None) -> str | None:
    """A check for noise scales and bias rates."""
    if value is None or value == 0 or SMALLEST <= value <= LARGEST:
        return None
    return f"it must be 0, or from {SMALLEST:g} to {LARGEST:g}"


@dataclass
class RouterConfig:
    """Router: the rule that sends each sample to a few experts.

    The registered rules add the choices of `kind` and their own options.
    """

    kind: str = "noisy_topk"
    top_k: int = 2
    """Experts per sample; expert_choice: on average, unless capacity_factor is set."""
    level: Literal["token", "image"] = "token"
    """experts.place blocks: whether each token chooses its experts, or each image chooses for all its tokens, by its
    class token (without one, by the mean of its patch tokens)."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation of the gate's input. batch: batch normalisation, so that what all samples have in common cannot
    send them all to the same experts. soft_moe normalises its tokens itself."""
    inputs: list[int] | None = None
    """The backbone.features that the gate reads, counted from 0; null: all."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the gate's MLP; empty: a linear gate."""
    dropout: float = 0.0
    """Dropout after each hidden layer of the gate."""
    temperature: float = 1.0
    """Divides the logits before their softmax (deepseek: before the score); above 1 makes weights more even."""
    warmup_steps: int = 500
    """Training steps with random routing at the start, so that every expert gets samples; rules that do not need this,
    such as hash and soft_moe, ignore it."""
    bias_rate: float | None = None
    """Loss-free balancing: step size of a bias that affects the choice of experts but not their weights; it moves
    the load towards target_load. null: 0.001 for deepseek, 0 (off) for other rules that choose k experts per sample."""
    target_load: Literal["even", "size", "inverse_size"] | list[float] = "even"
    """Target of balance losses, bias and capacities: even, size (proportional to the experts' sizes), inverse_size
    (equal work), or one share per expert."""
    capacity_factor: float | None = None
    """Largest number of samples per expert in a training step, as a multiple of its target load, rounded up; null: no
    limit. expert_choice: mean number of experts per sample (null: top_k). Evaluation has no limit."""
    capacity_order: Literal["position", "priority"] = "position"
    """Which samples get the slots of a full expert: the first ones in the batch, or those with the largest gate
    probability (Riquelme 2021). All first choices come before any second choice."""
    overflow: Literal["drop", "residual", "next_best"] = "drop"
    """What replaces a dropped choice. drop: nothing; residual: a linear head with the expert's weight; next_best: the
    sample's next expert with a free slot."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that a rule has added."""

    def __post_init__(self):
        check_options(self, "router")
        if self.top_k < 1:
            raise ValueError(f"router.top_k is {self.top_k}: it must be at least 1")
        if not all(1 <= width <= WIDEST for width in self.hidden):
            raise ValueError(f"router.hidden is {self.hidden}: hidden layers need 1 to {WIDEST:,} units")
        for name, check in (("dropout", share), ("bias_rate", zero_or_moderate)):
            if (value := getattr(self, name)) is not None and (reason := check(value)):
                raise ValueError(f"router.{name} is {value}: {reason}")
        if not SMALLEST <= self.temperature <= LARGEST:
            raise ValueError(
                f"router.temperature is {self.temperature}: it must be from {SMALLEST:g} to {LARGEST:g} (1: no change)"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"router.warmup_steps is {self.warmup_steps}: it cannot be negative")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"router.capacity_factor is {self.capacity_factor}: it must be finite and above 0")
        if self.overflow != "drop" and self.capacity_factor is None:
            raise ValueError(
                f"router.overflow {self.overflow} has no effect without router.capacity_factor: set it too"
            )
        if self.inputs is not None and (not self.inputs or len(set(self.inputs)) < len(self.inputs)):
            raise ValueError(f"router.inputs is {self.inputs}: name at least one feature, each once")
        if isinstance(self.target_load, list):
            if not all(0 < share < math.inf for share in self.target_load):
                raise ValueError(f"router.target_load is {self.target_load}: every share must be finite and above 0")
            if min(self.target_load) < SMALLEST * sum(self.target_load):
                raise ValueError(
                    f"router.target_load is {self.target_load}: every share must be at least {SMALLEST:g} of their sum"
                )

    @property
    def idle(self) -> list[str]:
        """One line for each option without effect: options of other rules, or of capacities that are not set."""
        found = []
        if self.capacity_order == "priority" and (self.capacity_factor is None or not ROUTERS[self.kind].token_choice):
            there = "without router.capacity_factor" if self.capacity_factor is None else f"under {self.kind}"
            found.append(f"router.capacity_order priority has no effect {there}")
        return found + ROUTERS.unread(self, "router")

    @property
    def random_steps(self) -> int:
        """Training steps with random routing: warmup_steps, or 0 for rules without warm-up."""
        return self.warmup_steps if ROUTERS[self.kind].warms_up else 0

    def target_shares(self, work: list[float]) -> list[Fraction]:
        """The exact target load of each expert, summing to 1. work: relative cost of each expert.

        Raises ValueError if target_load has another length.
        """
        costs = [exact(cost) for cost in work]
        shares = {"even": [Fraction(1)] * len(work), "size": costs, "inverse_size": [1 / cost for cost in costs]}
        if isinstance(self.target_load, list):
            chosen = [exact(share) for share in self.target_load]
        else:
            chosen = shares[self.target_load]
        if len(chosen) != len(work):
            raise ValueError(f"router.target_load names {len(chosen)} shares, but there are {len(work)} experts")
        return [share / sum(chosen) for share in chosen]


ROUTERS: "Registry[type[Router]]" = Registry("routing rule", RouterConfig, "kind")
"""The routing rules by name."""

register = ROUTERS.register
