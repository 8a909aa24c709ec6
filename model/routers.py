"""Routers: who sees whom, with what weight. One class per routing rule; each returns a Routing."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.norm import Standardise


@dataclass
class RouterConfig:
    """Router: the rule that sends each sample to a few experts."""

    kind: Literal["article", "noisy_topk"] = "noisy_topk"
    """article (noise in proportion to the logits' spread) or noisy_topk (learned noise, Shazeer 2017)."""
    top_k: int = 2
    """Experts that see each sample."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation of what the gate reads. batch: each feature centred and scaled over the training samples, so that
    what all samples share cannot send them all to the same experts."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the gate's MLP; empty: a linear gate."""
    dropout: float = 0.0
    """Dropout after each hidden layer of the gate."""
    noise_std: float = 0.5
    """article: standard deviation of the noise, as a share of the spread of the sample's own logits."""
    temperature: float = 1.0
    """Divides the logits before the softmax over the chosen experts; above 1 evens the weights."""
    warmup_steps: int = 500
    """Training steps that route at random before the gate takes over, so that no expert starves."""

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"router.top_k is {self.top_k}: at least one expert must see a sample")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"router.hidden is {self.hidden}: hidden layers need 1 unit or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"router.dropout is {self.dropout}: it must be at least 0 and below 1")
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(f"router.noise_std is {self.noise_std}: it must be finite and not negative")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"router.temperature is {self.temperature}: it must be finite and above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"router.warmup_steps is {self.warmup_steps}: it cannot be negative")


@dataclass
class Routing:
    """The decision of a router for B samples and E experts, as a flat list of A assignments.

    sample_A, expert_A: int64, which sample goes to which expert. weight_A: float32, what the expert's
    output counts. logits_BE: clean router logits, float32. load_BE: P(expert is chosen) under fresh noise,
    differentiable, where the rule has learned noise. learned: False for random warm-up routing.
    """

    sample_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    logits_BE: Tensor
    load_BE: Tensor | None = None
    learned: bool = True

    @property
    def num_samples(self) -> int:
        return self.logits_BE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_BE.shape[1]

    @property
    def probs_BE(self) -> Tensor:
        """Softmax of the clean logits over all experts."""
        return self.logits_BE.softmax(dim=-1)

    @cached_property
    def counts_E(self) -> Tensor:
        """Samples sent to each expert, int64, no gradient; on a GPU without waiting for it."""
        zeros_E = torch.zeros(self.num_experts, dtype=torch.int64, device=self.expert_A.device)
        return zeros_E.scatter_add_(0, self.expert_A, torch.ones_like(self.expert_A))

    @property
    def importance_E(self) -> Tensor:
        """Gate weight that each expert receives, summed over the batch (Shazeer 2017, eq. 6); differentiable."""
        return torch.zeros_like(self.logits_BE[0]).index_add(0, self.expert_A, self.weight_A)


class Router(nn.Module):
    """Base of the rules: a gate in float32, random routing in warm-up, and assignments from top-k choices."""

    def __init__(self, in_features: int, num_experts: int, config: RouterConfig):
        super().__init__()
        if config.top_k > num_experts:
            raise ValueError(f"router.top_k {config.top_k} is larger than the number of experts {num_experts}")
        self.num_experts, self.top_k, self.temperature = num_experts, config.top_k, config.temperature
        layers: list[nn.Module] = [Standardise(in_features, affine=False)] if config.norm == "batch" else []
        width = in_features
        for units in config.hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(config.dropout)]
            width = units
        self.trunk = nn.Sequential(*layers)
        self.gate = nn.Linear(width, num_experts)

    def forward(self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> Routing:
        """Route a batch; `warmup` draws k distinct experts a sample at random and weights them 1/k.

        allowed_E: bool, the experts that may be chosen (None: all), to ask what would happen without the others;
        at least k of them, or the surplus choices have weight 0.

        The gate computes in float32 whatever autocast says (Switch Transformers' selective precision).
        Noise is added in training mode only, so that evaluation is a function of the sample alone.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            hidden_BH = self.trunk(x_BD.float())
            logits_BE = self.gate(hidden_BH)
            if allowed_E is not None:
                logits_BE = logits_BE.masked_fill(~allowed_E, -math.inf)
            if warmup:
                return self._route_at_random(logits_BE)
            return self._route(logits_BE, hidden_BH)

    def _route(self, logits_BE: Tensor, hidden_BH: Tensor) -> Routing:
        raise RuntimeError(f"{type(self).__name__} has no routing rule")

    def _route_at_random(self, logits_BE: Tensor) -> Routing:
        expert_BK = torch.rand_like(logits_BE).topk(self.top_k, dim=-1).indices
        weight_BK = torch.full_like(logits_BE[:, : self.top_k], 1 / self.top_k)
        return _assignments(expert_BK, weight_BK, logits_BE, learned=False)

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor) -> Tensor:
        """Softmax over the chosen experts; for k = 1 over all of them, or the gate would get no gradient.

        For k >= 2 the softmax over all experts, renormalised over the chosen ones, is the same number.
        """
        scores_BE = scores_BE / self.temperature
        if self.top_k == 1:
            return scores_BE.softmax(dim=-1).gather(-1, expert_BK)
        return scores_BE.gather(-1, expert_BK).softmax(dim=-1)


class ArticleRouter(Router):
    """The reference recipe's gate: top-k of logits with noise in proportion to each sample's own spread.

    At training time noise of std `noise_std` * std(logits of the sample), the latter at least 1e-3.
    """

    def __init__(self, in_features: int, num_experts: int, config: RouterConfig):
        super().__init__(in_features, num_experts, config)
        self.noise_std = config.noise_std

    def _route(self, logits_BE: Tensor, hidden_BH: Tensor) -> Routing:
        noisy_BE = logits_BE
        if self.training and self.noise_std > 0 and self.num_experts > 1:
            spread_B1 = logits_BE.detach().std(dim=-1, keepdim=True).clamp_min(1e-3)
            noisy_BE = logits_BE + torch.randn_like(logits_BE) * self.noise_std * spread_B1
        expert_BK = noisy_BE.topk(self.top_k, dim=-1).indices
        return _assignments(expert_BK, self._weights(noisy_BE, expert_BK), logits_BE)


class NoisyTopKRouter(Router):
    """Noisy top-k gating with learned noise (Shazeer 2017, "Outrageously large neural networks", eq. 3-5).

    H = x W_g + eps * softplus(x W_noise), eps ~ N(0, 1) at training time; softmax over the k largest of H.
    Both matrices start at zero, so that the first choices are even (ibid., appendix A).
    """

    def __init__(self, in_features: int, num_experts: int, config: RouterConfig):
        super().__init__(in_features, num_experts, config)
        self.noise = nn.Linear(self.gate.in_features, num_experts, bias=False)
        for layer in (self.gate, self.noise):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.gate.bias)

    def _route(self, logits_BE: Tensor, hidden_BH: Tensor) -> Routing:
        if not self.training:
            expert_BK = logits_BE.topk(self.top_k, dim=-1).indices
            return _assignments(expert_BK, self._weights(logits_BE, expert_BK), logits_BE)
        sigma_BE = F.softplus(self.noise(hidden_BH)) + 1e-6
        noisy_BE = logits_BE + torch.randn_like(logits_BE) * sigma_BE
        expert_BK = noisy_BE.topk(self.top_k, dim=-1).indices
        load_BE = load_probability(logits_BE, noisy_BE, sigma_BE, self.top_k)
        return _assignments(expert_BK, self._weights(noisy_BE, expert_BK), logits_BE, load_BE)


def load_probability(clean_BE: Tensor, noisy_BE: Tensor, sigma_BE: Tensor, top_k: int) -> Tensor:
    """P(x, i): the probability that expert i is among the top k if its own noise is drawn again.

    Shazeer 2017, eq. 8-9: Phi((clean_i - threshold_i) / sigma_i), with threshold_i the k-th largest noisy
    logit of the others: the (k+1)-th of all where i is kept, else the k-th. The expectation over the noise
    of the sum over experts is k. Returns (B, E); ones where k = E.
    """
    num_experts = noisy_BE.shape[-1]
    if top_k == num_experts:
        return torch.ones_like(clean_BE)
    top_values = noisy_BE.topk(top_k + 1, dim=-1).values
    kth_B1, next_B1 = top_values[:, top_k - 1 : top_k], top_values[:, top_k:]
    threshold_BE = torch.where(noisy_BE >= kth_B1, next_B1, kth_B1)
    return torch.special.ndtr((clean_BE - threshold_BE) / sigma_BE)


def _assignments(expert_BK: Tensor, weight_BK: Tensor, logits_BE: Tensor, load_BE=None, learned=True) -> Routing:
    batch, top_k = expert_BK.shape
    sample_A = torch.arange(batch, device=expert_BK.device).repeat_interleave(top_k)
    return Routing(sample_A, expert_BK.flatten(), weight_BK.flatten(), logits_BE, load_BE, learned)


ROUTERS: dict[str, type[Router]] = {"article": ArticleRouter, "noisy_topk": NoisyTopKRouter}


def build_router(config: RouterConfig, in_features: int, num_experts: int) -> Router:
    """The router that `config.kind` names. Raises ValueError where top_k exceeds the number of experts."""
    return ROUTERS[config.kind](in_features, num_experts, config)
