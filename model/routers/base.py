"""Router: the base class of routing rules, and of rules with a gate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import rand_like
from ..norm import Standardise
from ..routing import Assignments, Gate, Routing
from .config import RouterConfig


class Router(nn.Module, ABC):
    """Base class of routing rules: a gate on features (B, in_features), and the options that all rules share.

    work: relative cost of each expert, for target_load (None: equal). num_groups: number of equally wide feature
    groups, which router.inputs refers to. Raises ValueError if the configuration does not fit the number of experts.
    """

    token_choice = True  # each sample chooses its experts
    fixed_k = True  # each sample chooses exactly top_k experts
    learns = True  # has a gate that the task loss trains
    warms_up = True  # benefits from random warm-up
    has_load = False  # returns load_BE in training
    reads_tokens = False  # reads (B, T, D) instead of (B, D)
    has_groups = False  # first chooses among router.groups groups of equally many experts
    only_top_k: int | None = None  # the only number of experts per sample that the rule supports
    paper: ClassVar[dict[str, float]] = {}  # options for which its paper has other defaults, by name

    grows = False  # takes new experts whose gate columns change nothing at the start

    work_E: Tensor
    margin_E: Tensor
    target_E: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterConfig,
        work: list[float] | None = None,
        num_groups: int = 1,
    ):
        super().__init__()
        self.check(config, num_experts)
        self.num_experts, self.top_k, self.temperature = num_experts, config.top_k, config.temperature
        self.grown: tuple[int, ...] = ()
        self.old: nn.Module | None = None  # the gate to compare with in training: see model/old_gate.py
        work = [1.0] * num_experts if work is None else work
        self.work = [cost * num_experts / sum(work) for cost in work]
        self.shares = config.target_shares(work)
        self.register_buffer("work_E", torch.tensor(self.work), persistent=False)
        self.register_buffer("target_E", torch.tensor([float(share) for share in self.shares]), persistent=False)
        layers: list[nn.Module] = []
        if config.inputs is not None:
            chosen = FeatureGroups(in_features, num_groups, config.inputs)
            layers.append(chosen)
            in_features = len(chosen.columns)
        if config.norm == "batch" and not self.reads_tokens:
            layers.append(Standardise(in_features, affine=False, by_running=not self.learns))
        width = in_features
        for units in config.hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(config.dropout)]
            width = units
        self.trunk = nn.Sequential(*layers)
        self._build_gate(width, config)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        """Raise ValueError if this rule does not support that number of experts or those options."""
        if cls.only_top_k not in (None, config.top_k):
            number = {1: "one expert", 2: "two experts"}[cls.only_top_k]
            raise ValueError(
                f"router.kind {config.kind} sends each sample to {number}: set router.top_k {cls.only_top_k}, not "
                f"{config.top_k}"
            )
        if config.top_k > num_experts:
            raise ValueError(f"router.top_k {config.top_k} is larger than the number of experts {num_experts}")
        if isinstance(config.target_load, list):
            config.target_shares([1.0] * num_experts)
        if not cls.token_choice and config.bias_rate:
            raise ValueError(
                f"router.bias_rate is for rules that choose k experts per sample, not {config.kind}: set it to 0"
            )
        if not cls.token_choice and config.overflow != "drop":
            raise ValueError(f"router.kind {config.kind} has no dropped choices to replace: set router.overflow drop")
        if not cls.learns and config.hidden:
            raise ValueError(f"router.kind {config.kind} has no gate network: set router.hidden []")

    @classmethod
    def only_scales(cls, config: RouterConfig, num_experts: int) -> str | None:
        """The options with which a gate only scales all weights of a sample by one factor (None: there are none).

        If the experts' probabilities are mixed, this factor cancels out and the gate learns nothing.
        """
        return "router.top_k 1" if cls.learns and cls.token_choice and config.top_k == 1 < num_experts else None

    @classmethod
    def lacks_load(cls, config: RouterConfig) -> str | None:
        """What to set so that routing has load_BE in training (None: it already has)."""
        return None if cls.has_load else "router.kind noisy_topk"

    @classmethod
    def check_growth(cls, config: RouterConfig) -> None:
        """Raise ValueError for a rule in which new experts would change the function."""
        if not cls.grows:
            raise ValueError(
                f"router.kind {config.kind} cannot get new experts without changing the others: leave out experts.add"
            )

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.gate = nn.Linear(width, self.num_experts)

    def entries_of(self, experts: Sequence[int], size: int) -> list[int]:
        """The positions of some experts' entries along an axis of a state tensor with `size` entries in total."""
        each = size // self.num_experts
        return [expert * each + entry for expert in experts for entry in range(each)]

    def grow(self, grown: Sequence[int], config: RouterConfig) -> None:
        """Mark the last experts as added to a trained gate. grown: the number of experts before each addition.

        Raises ValueError as `check_growth`.
        """
        self.check_growth(config)
        self.grown, self.opening_steps = tuple(grown), max(1, config.warmup_steps)
        self.register_buffer("margin_E", torch.zeros(self.num_experts))

    @torch.no_grad()
    def open_like(self, other: "Router") -> None:
        """Copy the margin of added experts from another router; a moving average of it would never reach zero."""
        if self.grown:
            self.margin_E.copy_(other.margin_E)

    def close_to(self, new_E: Tensor, old_E: Tensor) -> None:
        """Initialise the gate of new experts: never chosen, weight 0. new_E, old_E: new and old expert indices."""

    @property
    def experts_per_sample(self) -> float:
        """Mean number of assignments of a sample in evaluation."""
        return float(self.top_k)

    @property
    def static_shapes(self) -> bool:
        """Whether the number of assignments of a training step does not depend on the content of the batch."""
        return True

    @abstractmethod
    def forward(self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> Routing:
        """Route a batch. warmup: at random. allowed_E: bool, the experts that may be chosen (None: all)."""

    def after_step(self, routing: Routing) -> None:
        """Called once after each optimizer step with the routing of its batch."""


CLOSED, OPENING = 1e4, 10.0
"""How far the logits of new experts are below the others: at the start, where softmax gives a weight of exactly 0, and
from the first step on."""


class GatedRouter(Router):
    """A rule on the logits of a gate, (B, E)."""

    grows = True

    def forward(self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> Routing:
        """Route a batch; `warmup` draws k distinct experts per sample at random, with weights 1/k.

        allowed_E: bool, the experts that may be chosen (None: all), for ablations; if there are fewer than k, the
        other choices have weight 0.

        The gate computes in float32 even under autocast (Switch Transformers' selective precision). Noise and drops
        occur in training mode only, so that evaluation depends on the sample alone.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            x_BD = x_BD.float()
            hidden_BH = self.trunk(self._perturb(x_BD))
            logits_BE, sigma_BE = self._logits(hidden_BH, noisy=self.training and not warmup)
            if self.grown:
                logits_BE = logits_BE - self.margin_E
            if allowed_E is not None:
                logits_BE = logits_BE.masked_fill(~allowed_E, -math.inf)
            routing = self._route_at_random(logits_BE) if warmup else self._route(logits_BE, sigma_BE)
            if self.old is None or not self.training:
                return routing
            return replace(routing, gate=replace(routing.gate, old_BE=self.old(x_BD)))

    def clean_logits(self, x_BD: Tensor) -> Tensor:
        """Logits (B, E) of float32 features without noise, at the gate's temperature, as far as the gate is open."""
        logits_BE, _ = self._logits(self.trunk(x_BD), noisy=False)
        return self._tempered(logits_BE - self.margin_E if self.grown else logits_BE)

    def _perturb(self, x_BD: Tensor) -> Tensor:
        return x_BD

    def _logits(self, hidden_BH: Tensor, noisy: bool) -> tuple[Tensor, Tensor | None]:
        """Clean logits (B, E), and the standard deviation of learned noise if `noisy` and the rule has it."""
        return self._gate_logits(hidden_BH), None

    def _gate_logits(self, hidden_BH: Tensor) -> Tensor:
        """The gate's matrix product, separately for each addition, so that older logits stay the same bit for bit."""
        if not self.grown:
            return self.gate(hidden_BH)
        sizes = [last - first for first, last in pairwise([0, *self.grown, self.num_experts])]
        parts = zip(self.gate.weight.split(sizes), self.gate.bias.split(sizes), strict=True)
        return torch.cat([F.linear(hidden_BH, *part) for part in parts], dim=1)

    @torch.no_grad()
    def close_to(self, new_E: Tensor, old_E: Tensor) -> None:
        """See Router: gate columns of zeros, with logits CLOSED below all others.

        After the first step they are OPENING below, and this offset then goes to zero linearly over
        router.warmup_steps.
        """
        self.gate.weight[new_E] = 0
        self.gate.bias[new_E] = 0
        self.margin_E[new_E] = CLOSED

    @torch.no_grad()
    def after_step(self, routing: Routing) -> None:
        """Open the gate one step further to added experts."""
        if self.grown and routing.learned:
            self.margin_E.clamp_(max=OPENING).sub_(OPENING / self.opening_steps).clamp_(min=0)

    def _tempered(self, logits_BE: Tensor) -> Tensor:
        """The logits at the gate's temperature."""
        return logits_BE / self.temperature

    def _gate(self, logits_BE: Tensor, load_BE: Tensor | None = None, importance_BE: Tensor | None = None) -> Gate:
        """The Gate that the losses read, from clean logits (B, E)."""
        tempered_BE = logits_BE if self.temperature == 1 else self._tempered(logits_BE)
        return Gate(logits_BE, tempered_BE, load_BE, importance_BE, self.target_E, self.work_E)

    @abstractmethod
    def _route(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> Routing:
        """The rule: from clean logits (B, E) and the std of learned noise (None: no noise) to a Routing."""

    def _route_at_random(self, logits_BE: Tensor) -> Routing:
        draw_BE = rand_like(logits_BE).masked_fill(logits_BE == -math.inf, -1.0)
        expert_BK = draw_BE.topk(self.top_k, dim=-1).indices
        weight_BK = torch.full_like(logits_BE[:, : self.top_k], 1 / self.top_k, requires_grad=False)
        drawn = Assignments.of_each(expert_BK, weight_BK, self.num_experts)
        return Routing(drawn, self._gate(logits_BE), learned=False)


class FeatureGroups(nn.Module):
    """Selects some of the equally wide groups of a vector: (B, D) -> (B, number chosen * D / num_groups)."""

    columns: Tensor

    def __init__(self, in_features: int, num_groups: int, chosen: list[int]):
        super().__init__()
        self.register_buffer("columns", group_columns(in_features, num_groups, chosen), persistent=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD.index_select(-1, self.columns)


def group_columns(in_features: int, num_groups: int, chosen: list[int]) -> Tensor:
    """The columns of the chosen feature groups, int64.

    Raises ValueError for a group that does not exist.
    """
    if in_features % num_groups or not all(0 <= group < num_groups for group in chosen):
        raise ValueError(f"inputs {chosen} are not among the {num_groups} feature groups of {in_features} features")
    return torch.arange(in_features).view(num_groups, -1)[chosen].flatten()
