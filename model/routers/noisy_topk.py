"""Noisy top-k gating."""

from torch import Tensor

from ..distributed import randn_like
from .config import register
from .noise import LearnedNoiseRouter, load_probability


@register("noisy_topk", "learned noise (Shazeer 2017)")
class NoisyTopKRouter(LearnedNoiseRouter):
    """Noisy top-k gating with learned noise (Shazeer 2017, "Outrageously large neural networks", eq. 3-5).

    H = x W_g + eps * softplus(x W_noise), eps ~ N(0, 1) at training time; softmax over the k largest of H.
    """

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sigma_BE is None:
            return logits_BE, None
        noisy_BE = logits_BE + randn_like(logits_BE) * sigma_BE
        biased = self._biased(logits_BE, logits_BE), self._biased(noisy_BE, logits_BE)
        return noisy_BE, load_probability(*biased, sigma_BE, self.top_k)
