"""The rules in which each sample chooses its experts: what each ranks, and what a chosen expert weighs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import RouterConfig
from .token_choice import TokenChoiceRouter, renormalised


class ArticleRouter(TokenChoiceRouter):
    """The reference recipe's gate: top-k of logits with noise in proportion to each sample's own spread.

    At training time noise of std `noise_std` * std(logits of the sample), the latter at least 1e-3.
    """

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.noise_std = 0.5 if config.noise_std is None else config.noise_std

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, None]:
        if not self.training or self.noise_std == 0 or self.num_experts == 1:
            return logits_BE, None
        spread_B1 = logits_BE.detach().std(dim=-1, keepdim=True).clamp_min(1e-3)
        return logits_BE + torch.randn_like(logits_BE) * self.noise_std * spread_B1, None


class LearnedNoiseRouter(TokenChoiceRouter):
    """A gate whose noise has a learned standard deviation, softplus(x W_noise) (Shazeer 2017, eq. 4).

    Both matrices start at zero, so that the first choices are even (ibid., appendix A).
    """

    has_load = True

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.gate = nn.Linear(width, self._outputs)
        self.noise = nn.Linear(width, self._outputs, bias=False)
        for layer in (self.gate, self.noise):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.gate.bias)

    @property
    def _outputs(self) -> int:
        return self.num_experts

    def _logits(self, hidden_BH: Tensor, noisy: bool) -> tuple[Tensor, Tensor | None]:
        if not noisy:
            return self.gate(hidden_BH), None
        # As one product the two read the features once.
        weight = torch.cat([self.gate.weight, self.noise.weight])
        bias = torch.cat([self.gate.bias, torch.zeros_like(self.gate.bias)])
        logits, noise = F.linear(hidden_BH, weight, bias).chunk(2, dim=1)
        return logits, F.softplus(noise) + 1e-6


class NoisyTopKRouter(LearnedNoiseRouter):
    """Noisy top-k gating with learned noise (Shazeer 2017, "Outrageously large neural networks", eq. 3-5).

    H = x W_g + eps * softplus(x W_noise), eps ~ N(0, 1) at training time; softmax over the k largest of H.
    """

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sigma_BE is None:
            return logits_BE, None
        noisy_BE = logits_BE + torch.randn_like(logits_BE) * sigma_BE
        biased = self._biased(logits_BE, logits_BE), self._biased(noisy_BE, logits_BE)
        return noisy_BE, load_probability(*biased, sigma_BE, self.top_k)


class SoftmaxFirstRouter(TokenChoiceRouter):
    """A rule whose weights are the softmax over all experts, not renormalised over the chosen ones."""

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        return (scores_BE / self.temperature).softmax(dim=-1).gather(-1, expert_BK)


class VMoERouter(SoftmaxFirstRouter):
    """V-MoE (Riquelme 2021, "Scaling vision with sparse mixture of experts"): TOP_k(softmax(W x + eps)).

    eps ~ N(0, noise_std^2) at training time, of std 1/E. The importance loss reads the clean gates over all
    experts, the load loss the chance to be chosen under fresh noise. With `capacity_order priority` samples
    take their places by their largest gate (Batch Prioritized Routing, ibid., section 4).
    """

    has_load = True

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.noise_std = 1 / self.num_experts if config.noise_std is None else config.noise_std

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.training or self.noise_std == 0:
            return logits_BE, None
        noisy_BE = logits_BE + torch.randn_like(logits_BE) * self.noise_std
        fixed_BE = torch.full_like(logits_BE, self.noise_std, requires_grad=False)
        biased = self._biased(logits_BE, logits_BE), self._biased(noisy_BE, logits_BE)
        return noisy_BE, load_probability(*biased, fixed_BE, self.top_k)

    def _importance(self, logits_BE: Tensor) -> Tensor:
        return self._tempered(logits_BE).softmax(dim=-1)


class SwitchRouter(SoftmaxFirstRouter):
    """Switch Transformers (Fedus 2021): the best expert alone, weighted by its probability (eq. 1-2).

    At training time each input of the gate is multiplied by a number drawn evenly from 1 - jitter to 1 + jitter.
    """

    only_top_k = 1

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.jitter = config.jitter

    def _perturb(self, x_BD: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x_BD
        return x_BD * torch.empty_like(x_BD).uniform_(1 - self.jitter, 1 + self.jitter)


class GShardRouter(TokenChoiceRouter):
    """GShard (Lepikhin 2020, algorithm 1): the best two experts, their probabilities renormalised over the two.

    At training time the second is used with probability 2 g2, g2 <= 1/2 its renormalised gate; the first keeps
    its weight. Evaluation uses both.
    """

    only_top_k = 2

    def _wanted(self, weight_BK: Tensor) -> Tensor:
        second_B = 2 * weight_BK[:, 1].detach() > torch.rand_like(weight_BK[:, 1])
        return torch.stack([torch.ones_like(second_B), second_B], dim=-1)


class MixtralRouter(TokenChoiceRouter):
    """Mixtral (Jiang 2024, section 2.1): softmax over the k largest logits, no noise."""

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        if config.top_k == 1 < num_experts:
            raise ValueError(
                "router.kind mixtral with router.top_k 1 weights every choice 1 and gives the gate no gradient: "
                "set router.top_k 2, or router.kind switch"
            )
        super().check(config, num_experts)


class DeepSeekRouter(TokenChoiceRouter):
    """DeepSeekMoE's gate without auxiliary loss: top-k of score + bias, weighted by the score alone.

    sigmoid (DeepSeek-V3, DeepSeek-AI 2024, eq. 13-16): weights are the chosen scores over their sum; for k = 1 the
    score itself, or the gate would get no gradient. softmax (DeepSeekMoE, Dai 2024): the scores as they are. The
    experts that always run beside the chosen ones are `experts.shared`.
    """

    default_bias_rate = 1e-3

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.sigmoid = config.scores == "sigmoid"

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, None]:
        """Logarithms of the scores, which rank alike: a score itself underflows to 0, and is 1 from logits of 17 on."""
        logits_BE = logits_BE / self.temperature
        return (F.logsigmoid(logits_BE) if self.sigmoid else logits_BE.log_softmax(dim=-1)), None

    def _biased(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        return super()._biased(scores_BE.exp(), logits_BE)

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        chosen_BK = scores_BE.gather(-1, expert_BK)
        if not self.sigmoid or self.top_k == 1:
            return chosen_BK.exp()
        return renormalised(chosen_BK, placed_BK)


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
    kth_B1, next_B1 = top_values[..., top_k - 1 : top_k], top_values[..., top_k:]
    threshold_BE = torch.where(noisy_BE >= kth_B1, next_B1, kth_B1)
    return torch.special.ndtr((clean_BE - threshold_BE) / sigma_BE)
