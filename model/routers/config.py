"""RouterConfig: the options of every routing rule."""

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal

from .capacity import exact

LARGEST, SMALLEST = 1e6, 1e-6
"""Bounds of what multiplies or divides logits, so that float32 holds the results."""

WIDEST = 1_000_000_000
"""Units of a layer and the like: more have no place in any memory."""

READ_BY = {
    "noise_std": ("article", "vmoe"),
    "jitter": ("switch",),
    "scores": ("deepseek",),
    "groups": ("hierarchical",),
    "top_groups": ("hierarchical",),
    "slots": ("soft_moe",),
}
"""Options of some rules alone, and the kinds that read them."""


@dataclass
class RouterConfig:
    """Router: the rule that sends each sample to a few experts."""

    kind: Literal[
        "article",
        "noisy_topk",
        "vmoe",
        "switch",
        "gshard",
        "mixtral",
        "deepseek",
        "hierarchical",
        "expert_choice",
        "hash",
        "soft_moe",
    ] = "noisy_topk"
    """article: noise in proportion to the logits' spread; noisy_topk: learned noise (Shazeer 2017); vmoe: fixed noise,
    softmax before top-k (Riquelme 2021); switch: the best expert alone, jittered input (Fedus 2021); gshard: the best
    two, the second by chance (Lepikhin 2020); mixtral: softmax over the best k, no noise (Jiang 2024); deepseek: top-k
    of score + bias, the bias evens the load without a loss (DeepSeek-AI 2024); hierarchical: a group of experts, then
    experts in it (Shazeer 2017); expert_choice: each expert takes its best samples (Zhou 2022); hash: a fixed random
    projection decides, nothing is learned (Roller 2021); soft_moe: every expert reads its own mixtures of the patch
    tokens (Puigcerver 2023)."""
    top_k: int = 2
    """Experts that see each sample; expert_choice: on average, unless capacity_factor says otherwise."""
    level: Literal["token", "image"] = "token"
    """experts.place blocks: whether each token chooses its experts, or each image for all its tokens, by its class
    token (where the ViT has none, by the mean of its patch tokens)."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation of what the gate reads. batch: each feature centred and scaled over the training samples, so that
    what all samples share cannot send them all to the same experts. soft_moe scales its tokens in its own way."""
    inputs: list[int] | None = None
    """Which of backbone.features the gate reads, counted from 0; null: all."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the gate's MLP; empty: a linear gate."""
    dropout: float = 0.0
    """Dropout after each hidden layer of the gate."""
    noise_std: float | None = None
    """article: standard deviation of the noise as a share of the spread of the sample's own logits (null: 0.5);
    vmoe: standard deviation of the noise on the logits (null: one over the number of experts)."""
    jitter: float = 0.01
    """switch: while training, each input of the gate is multiplied by a number drawn from 1 - jitter to 1 + jitter."""
    temperature: float = 1.0
    """Divides the logits before their softmax (deepseek: before the score); above 1 evens the weights."""
    warmup_steps: int = 500
    """Training steps that route at random before the gate takes over, so that no expert starves; hash and soft_moe,
    under which none can, have no such steps."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """deepseek: sigmoid, weights divided by their sum (V3); or softmax over all experts, weights as they are."""
    bias_rate: float | None = None
    """Loss-free balance: how far a bias, which counts in the choice of experts but not in their weight, moves after
    each step towards target_load; null: 0.001 for deepseek, 0 (off) for the other rules that choose k experts a
    sample."""
    target_load: Literal["even", "size", "inverse_size"] | list[float] = "even"
    """The load that the balance losses, the bias and the capacities aim at: even, in proportion to the experts' sizes
    or to one over them (equal work), or one share an expert."""
    groups: int = 2
    """hierarchical: number of groups, each of as many experts in the order of experts.sizes."""
    top_groups: int = 1
    """hierarchical: groups that see each sample; top_k is divided among them."""
    slots: int = 1
    """soft_moe: mixtures of tokens that each expert reads."""
    capacity_factor: float | None = None
    """Most samples that an expert takes in a training step, as a multiple of its target load, rounded up; null: no
    limit. expert_choice: the experts that see a sample on average (null: top_k). Evaluation has no limit."""
    capacity_order: Literal["position", "priority"] = "position"
    """Who comes first where places are short: samples as they stand in the batch, or those with the largest gate
    probability (Riquelme 2021). All first choices come before any second one."""
    overflow: Literal["drop", "residual", "next_best"] = "drop"
    """What becomes of a choice without a place. drop: nothing; residual: a linear head stands in for the expert, with
    its weight; next_best: the sample's next expert with a place."""

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"router.top_k is {self.top_k}: at least one expert must see a sample")
        if not all(1 <= width <= WIDEST for width in self.hidden):
            raise ValueError(f"router.hidden is {self.hidden}: hidden layers have from 1 to {WIDEST:,} units")
        for name in ("dropout", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"router.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        for name in ("noise_std", "bias_rate"):
            value = getattr(self, name)
            if value is not None and value != 0 and not SMALLEST <= value <= LARGEST:
                raise ValueError(f"router.{name} is {value}: it must be 0, or from {SMALLEST:g} to {LARGEST:g}")
        if not SMALLEST <= self.temperature <= LARGEST:
            raise ValueError(
                f"router.temperature is {self.temperature}: it must be from {SMALLEST:g} to {LARGEST:g} (1 leaves the "
                "logits as they are)"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"router.warmup_steps is {self.warmup_steps}: it cannot be negative")
        for name in ("groups", "top_groups", "slots"):
            if not 1 <= getattr(self, name) <= WIDEST:
                raise ValueError(f"router.{name} is {getattr(self, name)}: it must be from 1 to {WIDEST:,}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"router.capacity_factor is {self.capacity_factor}: it must be finite and above 0")
        if self.overflow != "drop" and self.capacity_factor is None:
            raise ValueError(f"router.overflow {self.overflow} does nothing without router.capacity_factor: set it too")
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
        """What has been set to no effect, a line each: options of other rules, or of capacities without any."""
        defaults = {option.name: option.default for option in fields(self)}
        found = []
        if self.capacity_order == "priority" and (self.capacity_factor is None or self.kind == "expert_choice"):
            there = "without router.capacity_factor" if self.capacity_factor is None else f"under {self.kind}"
            found.append(f"router.capacity_order priority does nothing {there}")
        return found + [
            f"router.{name} {getattr(self, name)} does nothing under router.kind {self.kind}: only "
            f"{' and '.join(kinds)} {'reads' if len(kinds) == 1 else 'read'} it"
            for name, kinds in READ_BY.items()
            if self.kind not in kinds and getattr(self, name) != defaults[name]
        ]

    @property
    def random_steps(self) -> int:
        """Training steps with random routing: warmup_steps, but none for the rules that have no use for them."""
        return 0 if self.kind in ("hash", "soft_moe") else self.warmup_steps

    def target_shares(self, work: list[float]) -> list[Fraction]:
        """The load that each expert should have, exactly, summing to 1. work: relative cost of each expert.

        Raises ValueError where target_load has another length.
        """
        costs = [exact(cost) for cost in work]
        shares = {"even": [Fraction(1)] * len(work), "size": costs, "inverse_size": [1 / cost for cost in costs]}
        listed = isinstance(self.target_load, list)
        chosen = [exact(share) for share in self.target_load] if listed else shares[self.target_load]
        if len(chosen) != len(work):
            raise ValueError(f"router.target_load names {len(chosen)} shares, but there are {len(work)} experts")
        return [share / sum(chosen) for share in chosen]
