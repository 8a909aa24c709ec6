"""V-MoE's gate."""

import torch
from torch import Tensor

from ..distributed import randn_like
from .config import RouterConfig, register
from .noise import NOISE_STD, load_probability
from .token_choice import SoftmaxFirstRouter


@register("vmoe", "fixed noise, softmax before top-k (Riquelme 2021)", options=[NOISE_STD])
class VMoERouter(SoftmaxFirstRouter):
    """V-MoE (Riquelme 2021, "Scaling vision with sparse mixture of experts"): TOP_k(softmax(W x + eps)).

    eps ~ N(0, noise_std^2) in training, with std 1/E by default. The importance loss uses the noise-free gates
    over all experts, the load loss the probability of being chosen under fresh noise. With `capacity_order priority`
    samples get their slots in order of their largest gate value (Batch Prioritized Routing, ibid., section 4).
    """

    has_load = True

    @classmethod
    def lacks_load(cls, config: RouterConfig) -> str | None:
        """See Router; this rule also needs noise."""
        return "router.noise_std above 0" if config.noise_std == 0 else None

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.noise_std = 1 / self.num_experts if config.noise_std is None else config.noise_std

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.training or self.noise_std == 0:
            return logits_BE, None
        noisy_BE = logits_BE + randn_like(logits_BE) * self.noise_std
        fixed_BE = torch.full_like(logits_BE, self.noise_std, requires_grad=False)
        biased = self._biased(logits_BE, logits_BE), self._biased(noisy_BE, logits_BE)
        return noisy_BE, load_probability(*biased, fixed_BE, self.top_k)

    def _importance(self, logits_BE: Tensor) -> Tensor:
        return self._tempered(logits_BE).softmax(dim=-1)
