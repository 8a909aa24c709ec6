"""DeepSeek's gate, balanced without an auxiliary loss."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ..options import Option
from .config import RouterConfig, register
from .token_choice import TokenChoiceRouter, renormalised

SCORES = Option(
    "scores",
    Literal["sigmoid", "softmax"],
    "sigmoid",
    "deepseek: sigmoid, with weights divided by their sum (V3), or softmax over all experts, without this division.",
)


@register(
    "deepseek",
    "top-k of score + bias, which balances the load without a loss (DeepSeek-AI 2024)",
    options=[SCORES],
)
class DeepSeekRouter(TokenChoiceRouter):
    """DeepSeekMoE's gate without auxiliary loss: top-k of score + bias, weighted by the score only.

    sigmoid (DeepSeek-V3, DeepSeek-AI 2024, eq. 13-16): weights are the chosen scores over their sum; for k = 1 the
    score itself, because the gate would get no gradient otherwise. softmax (DeepSeekMoE, Dai 2024): the scores
    themselves. Its shared experts are `experts.shared`.
    """

    default_bias_rate = 1e-3
    paper: ClassVar = {"balance.switch": 0.0}

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.sigmoid = config.scores == "sigmoid"

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, None]:
        """Logarithms of the scores, in the same order; the scores underflow to 0 and round to 1 for logits above 17."""
        logits_BE = logits_BE / self.temperature
        return (F.logsigmoid(logits_BE) if self.sigmoid else logits_BE.log_softmax(dim=-1)), None

    def _biased(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        return super()._biased(scores_BE.exp(), logits_BE)

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        chosen_BK = scores_BE.gather(-1, expert_BK)
        if not self.sigmoid or self.top_k == 1:
            return chosen_BK.exp()
        return renormalised(chosen_BK, placed_BK)
