"""The gate of the reference recipe."""

from typing import ClassVar

from torch import Tensor

from ..distributed import randn_like
from .config import RouterConfig, register
from .noise import NOISE_STD
from .token_choice import TokenChoiceRouter


@register("article", "noise proportional to the standard deviation of the logits", options=[NOISE_STD])
class ArticleRouter(TokenChoiceRouter):
    """The reference recipe's gate: top-k of logits with noise proportional to each sample's own standard deviation.

    At training time noise of std `noise_std` * std(logits of the sample), the latter at least 1e-3.
    """

    paper: ClassVar = {"balance.switch": 0.0}

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.noise_std = 0.5 if config.noise_std is None else config.noise_std

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, None]:
        if not self.training or self.noise_std == 0 or self.num_experts == 1:
            return logits_BE, None
        spread_B1 = logits_BE.detach().std(dim=-1, keepdim=True).clamp_min(1e-3)
        return logits_BE + randn_like(logits_BE) * self.noise_std * spread_B1, None
