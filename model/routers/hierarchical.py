"""Hierarchical routing: groups of experts, then experts in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import randn_like
from ..options import Option, count
from .config import RouterConfig, register
from .noise import LearnedNoiseRouter, load_probability

GROUPS = (
    Option(
        "groups",
        int,
        2,
        "hierarchical: number of equally large groups of experts, in the order of experts.sizes.",
        count,
    ),
    Option("top_groups", int, 1, "hierarchical: groups per sample; top_k is divided among them.", count),
)


@register("hierarchical", "a group of experts, then experts in it (Shazeer 2017)", options=GROUPS)
class HierarchicalRouter(LearnedNoiseRouter):
    """A noisy gate chooses groups, and another gate per group chooses experts in it (Shazeer 2017, appendix B).

    The experts form `groups` groups of equal size; a sample goes to `top_groups` groups, and to top_k / top_groups
    experts of each. An expert's weight is the product of the two gates (Jordan and Jacobs 1994), each a softmax over
    the chosen entries, or, if only one is chosen, its probability among all, so that both gates learn. logits_BE are
    joint: their softmax is P(group) P(expert | group), and their logsumexp, which the z-loss reads, is that of the
    groups. A bias is added to the joint score and so affects both choices.
    """

    grows = False
    has_groups = True

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        super().check(config, num_experts)
        if num_experts % config.groups:
            raise ValueError(
                f"router.groups {config.groups} does not divide the {num_experts} experts: kind hierarchical needs "
                "groups of equal size"
            )
        if config.top_groups > config.groups:
            raise ValueError(f"router.top_groups {config.top_groups} is larger than router.groups {config.groups}")
        within, members = config.top_k // config.top_groups, num_experts // config.groups
        if config.top_k % config.top_groups or not 1 <= within <= members:
            raise ValueError(
                f"router.top_k {config.top_k} cannot be divided among router.top_groups {config.top_groups} groups of "
                f"{members} experts: each needs the same number, at most {members}"
            )
        if config.overflow == "next_best":
            raise ValueError(
                "router.kind hierarchical does not support router.overflow next_best: use drop or residual"
            )

    @classmethod
    def only_scales(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See Router; also if a sample goes to one of several groups, whose gate is a factor of every weight."""
        single = "router.top_groups 1" if config.top_groups == 1 < config.groups else None
        return super().only_scales(config, num_experts) or single

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.groups, self.top_groups = config.groups, config.top_groups
        self.top_within = config.top_k // config.top_groups
        super()._build_gate(width, config)

    @property
    def _outputs(self) -> int:
        return self.groups + self.num_experts

    def entries_of(self, experts: Sequence[int], size: int) -> list[int]:
        """See Router; first the gate outputs for the groups of the experts, then those for the experts."""
        if size != self._outputs:
            return super().entries_of(experts, size)
        members = self.num_experts // self.groups
        groups = [expert // members for expert in experts if expert % members == 0]
        return [*groups, *(self.groups + expert for expert in experts)]

    def _logits(self, hidden_BH: Tensor, noisy: bool) -> tuple[Tensor, Tensor | None]:
        values, sigma = super()._logits(hidden_BH, noisy)
        return self._join(*self._split(values)), sigma

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split a layer's output into those for groups and for the experts in each."""
        return values[:, : self.groups], values[:, self.groups :].unflatten(1, (self.groups, -1))

    @staticmethod
    def _join(group_BG: Tensor, expert_BGM: Tensor) -> Tensor:
        """Joint logits: their logsumexp over a group's experts is the group's logit."""
        return (group_BG[..., None] + expert_BGM.log_softmax(dim=-1)).flatten(1)

    def _levels(self, joint_BE: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The logits of the groups and, up to a constant per group, of the experts in each, at a temperature."""
        # Finite at every temperature, so that a group of excluded experts has weight 0 instead of 0/0.
        least = torch.finfo(joint_BE.dtype).min / 4
        expert_BGM = joint_BE.clamp_min(least).unflatten(1, (self.groups, -1))
        group_BG = expert_BGM.logsumexp(dim=-1)
        return (group_BG / temperature).clamp_min(least), (expert_BGM / temperature).clamp_min(least)

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sigma_BE is None:
            return logits_BE, None
        levels, sigmas = self._levels(logits_BE), self._split(sigma_BE)  # for the groups and for the experts
        noisy = [clean + randn_like(clean) * sigma for clean, sigma in zip(levels, sigmas, strict=True)]
        load_BG, load_BGM = (
            load_probability(clean + shift, drawn + shift, sigma, top_k)
            for clean, drawn, shift, sigma, top_k in zip(
                levels, noisy, self._shifts(logits_BE), sigmas, (self.top_groups, self.top_within), strict=True
            )
        )
        return self._join(*noisy), (load_BG[..., None] * load_BGM).flatten(1)

    def _shifts(self, logits_BE: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The bias of the logits of the groups and of the experts.

        The score of a group increases by the amount that the bias adds to the sum of its noise-free gates. The noise of
        its experts is not used, so that their probability of being chosen is independent of that of their group, and
        the load estimate is the product of the two.
        """
        if not self.bias_rate:
            return 0.0, 0.0
        bias_GM = self.bias_E.unflatten(0, (self.groups, -1))
        _, expert_BGM = self._levels(logits_BE)
        return (expert_BGM.log_softmax(dim=-1) + bias_GM).logsumexp(dim=-1), bias_GM

    def _biased(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        if not self.bias_rate:
            return scores_BE
        levels = self._levels(scores_BE)
        return self._join(*(level + shift for level, shift in zip(levels, self._shifts(logits_BE), strict=True)))

    def _tempered(self, logits_BE: Tensor) -> Tensor:
        return self._join(*self._levels(logits_BE, self.temperature))

    def _choose(self, ranked_BE: Tensor) -> Tensor:
        group_BG, expert_BGM = self._levels(ranked_BE)
        chosen_BQ = group_BG.topk(self.top_groups, dim=-1).indices
        best_BGW = expert_BGM.topk(self.top_within, dim=-1).indices
        best_BQW = best_BGW.gather(1, chosen_BQ[..., None].expand(-1, -1, self.top_within))
        return (chosen_BQ[..., None] * expert_BGM.shape[-1] + best_BQW).flatten(1)

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        group_BG, expert_BGM = self._levels(scores_BE, self.temperature)
        index_BQW = expert_BK.unflatten(1, (self.top_groups, self.top_within))
        chosen_BQ = index_BQW[..., 0] // expert_BGM.shape[-1]
        member_BQW = index_BQW % expert_BGM.shape[-1]
        expert_BQM = expert_BGM.gather(1, chosen_BQ[..., None].expand(-1, -1, expert_BGM.shape[-1]))
        group_BQ = chosen_gates(group_BG, chosen_BQ)
        return (group_BQ[..., None] * chosen_gates(expert_BQM, member_BQW)).flatten(1)


def chosen_gates(logits: Tensor, chosen: Tensor) -> Tensor:
    """Softmax over the chosen entries of the last dimension; for a single one, its probability among all."""
    if chosen.shape[-1] == 1:
        return logits.softmax(dim=-1).gather(-1, chosen)
    return logits.gather(-1, chosen).softmax(dim=-1)
