"""Noise on the logits: learned noise with its load estimate, and noise of fixed size."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import Option
from .config import RouterConfig, zero_or_moderate
from .token_choice import TokenChoiceRouter

NOISE_STD = Option(
    "noise_std",
    float | None,
    None,
    "article: standard deviation of the noise relative to that of the sample's own logits (null: 0.5); vmoe: standard "
    "deviation of the noise on the logits (null: one over the number of experts).",
    zero_or_moderate,
)
"""For rules whose noise has a fixed size, each in its own unit."""


class LearnedNoiseRouter(TokenChoiceRouter):
    """A gate whose noise has a learned standard deviation, softplus(x W_noise) (Shazeer 2017, eq. 4).

    Both matrices start at zero, so that the first choices are balanced (ibid., appendix A).
    """

    has_load = True

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.gate = nn.Linear(width, self._outputs)
        self.noise = nn.Linear(width, self._outputs, bias=False)
        for layer in (self.gate, self.noise):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.gate.bias)

    @torch.no_grad()
    def close_to(self, new_E: Tensor, old_E: Tensor) -> None:
        """See GatedRouter; the noise starts as in any new gate."""
        super().close_to(new_E, old_E)
        self.noise.weight[new_E] = 0

    @property
    def _outputs(self) -> int:
        return self.num_experts

    def _logits(self, hidden_BH: Tensor, noisy: bool) -> tuple[Tensor, Tensor | None]:
        if not noisy:
            return self._gate_logits(hidden_BH), None
        # In one product, both read the features only once.
        weight = torch.cat([self.gate.weight, self.noise.weight])
        bias = torch.cat([self.gate.bias, torch.zeros_like(self.gate.bias)])
        logits, noise = F.linear(hidden_BH, weight, bias).chunk(2, dim=1)
        return logits, F.softplus(noise) + 1e-6


def load_probability(clean_BE: Tensor, noisy_BE: Tensor, sigma_BE: Tensor, top_k: int) -> Tensor:
    """P(x, i): the probability that expert i is among the top k if its own noise is drawn again.

    Shazeer 2017, eq. 8-9: Phi((clean_i - threshold_i) / sigma_i), with threshold_i the k-th largest noisy
        logit of the others: the (k+1)-th of all if i is kept, else the k-th. The expectation over the noise
    of the sum over experts is k. Returns (B, E); ones if k = E.
    """
    num_experts = noisy_BE.shape[-1]
    if top_k == num_experts:
        return torch.ones_like(clean_BE)
    top_values = noisy_BE.topk(top_k + 1, dim=-1).values
    kth_B1, next_B1 = top_values[..., top_k - 1 : top_k], top_values[..., top_k:]
    threshold_BE = torch.where(noisy_BE >= kth_B1, next_B1, kth_B1)
    return torch.special.ndtr((clean_BE - threshold_BE) / sigma_BE)
