"""Common base of rules in which each sample chooses its experts: ranking, loss-free bias, capacities."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed import gathered, own_rows, whole_size
from ..routing import Assignments, Drops, Routing
from .base import GatedRouter
from .capacity import exact, expert_capacity, place
from .config import RouterConfig


class TokenChoiceRouter(GatedRouter):
    """Top-k of scores, a loss-free bias on the choice, capacities in training.

    A rule defines the scores for ranking (`_scores`) and the weights of chosen experts (`_weights`); the rest is here:

    - bias_E (Wang 2024, "Auxiliary-loss-free load balancing"; DeepSeek-V3, eq. 16) is added to the scores for ranking
      and never changes a weight. `after_step` moves it by bias_rate towards the target load. It is saved with the
      model, and in a moving average of the weights it is averaged with the gate that it belongs to.
    - If capacity_factor is set, it limits the number of samples per expert in a training step.
    """

    default_bias_rate = 0.0
    bias_E: Tensor

    def __init__(self, in_features: int, num_experts: int, config: RouterConfig, work=None, num_groups: int = 1):
        super().__init__(in_features, num_experts, config, work, num_groups)
        self.capacity_factor, self.overflow = config.capacity_factor, config.overflow
        self.prioritised = config.capacity_order == "priority"
        self.bias_rate = self.default_bias_rate if config.bias_rate is None else config.bias_rate
        if self.bias_rate:
            self.register_buffer("bias_E", torch.zeros(num_experts))

    @property
    def static_shapes(self) -> bool:
        return self.capacity_factor is None and type(self)._wanted is TokenChoiceRouter._wanted

    def _scores(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scores to rank, with noise, and load_BE if the rule has it."""
        return logits_BE, None

    def _biased(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        """The scores with the loss-free bias, if there is one. logits_BE: clean logits."""
        return scores_BE + self.bias_E if self.bias_rate else scores_BE

    def _choose(self, ranked_BE: Tensor) -> Tensor:
        """The chosen experts of each sample, (B, k), the first choice first."""
        return ranked_BE.topk(self.top_k, dim=-1).indices

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        """Weights of the chosen experts, here their softmax; placed_BK leaves out dropped ones.

        For one expert per sample this is the softmax over all experts, because the gate would get no gradient
        otherwise. For more, it equals the softmax over all experts, renormalised over the chosen ones.
        """
        scores_BE = scores_BE / self.temperature
        if self.top_k == 1:
            return scores_BE.softmax(dim=-1).gather(-1, expert_BK)
        return renormalised(scores_BE.gather(-1, expert_BK), placed_BK)

    def _ranked(self, scores_BE: Tensor, logits_BE: Tensor) -> Tensor:
        """The biased scores, with excluded experts last."""
        if not self.bias_rate:
            return scores_BE
        # An excluded expert's score is finite under some rules, and the bias could raise it above the others.
        return self._biased(scores_BE, logits_BE).masked_fill(logits_BE == -math.inf, -math.inf)

    def _wanted(self, weight_BK: Tensor) -> Tensor | None:
        """Which of the choices the rule keeps (None: all)."""
        return None

    def _importance(self, logits_BE: Tensor) -> Tensor | None:
        """The gate that is summed to the importance, from the clean logits (None: the weights)."""
        return None

    def _route(self, logits_BE: Tensor, sigma_BE: Tensor | None) -> Routing:
        scores_BE, load_BE = self._scores(logits_BE, sigma_BE)
        ranked_BE = self._ranked(scores_BE, logits_BE)
        expert_BK = self._choose(ranked_BE)
        weight_BK = self._weights(scores_BE, expert_BK)
        wanted_BK = self._wanted(weight_BK)
        if self.training and self.capacity_factor is not None:
            return self._route_to_places(logits_BE, scores_BE, ranked_BE, expert_BK, weight_BK, wanted_BK, load_BE)
        assignments = Assignments.of_each(expert_BK, weight_BK, self.num_experts)
        if wanted_BK is not None:
            assignments = assignments.kept(wanted_BK.flatten())
        return Routing(assignments, self._gate(logits_BE, load_BE, self._importance(logits_BE)))

    def _route_to_places(self, logits_BE, scores_BE, ranked_BE, expert_BK, weight_BK, wanted_BK, load_BE) -> Routing:
        """The assignments that are kept under the capacities."""
        assert self.capacity_factor is not None
        batch, k = expert_BK.shape
        whole = whole_size(batch)  # slots are counted over the whole batch of all processes
        wanted_BK = torch.ones_like(expert_BK, dtype=torch.bool) if wanted_BK is None else wanted_BK
        places = expert_capacity(whole, self.top_k * exact(self.capacity_factor), self.shares)
        capacity_E = torch.tensor(places, device=expert_BK.device)
        # Probabilities, because logits are not comparable between samples.
        priority_B = None
        if self.prioritised:
            priority_B = self._tempered(logits_BE.detach()).softmax(dim=-1).amax(dim=-1)
        expert_BR, weight_BR, spare_BS = expert_BK, weight_BK, None
        if self.overflow == "next_best":
            # In order of preference, all experts that the sample did not request, including dropped choices.
            order_BE = ranked_BE.argsort(dim=-1, descending=True, stable=True)
            expert_BR = torch.cat([expert_BK, order_BE], dim=-1)
            spare_BS = ~torch.zeros_like(ranked_BE, dtype=torch.bool).scatter(1, expert_BK, wanted_BK).gather(
                1, order_BE
            )
        asked = (gathered(expert_BR), gathered(wanted_BK), capacity_E)
        ranks = (None if rows is None else gathered(rows) for rows in (priority_B, spare_BS))
        placed_BR = own_rows(place(*asked, *ranks))
        if self.overflow == "next_best":
            spared_BE = torch.zeros_like(ranked_BE, dtype=torch.bool).scatter(1, order_BE, placed_BR[:, k:])
            unwanted_BK = ~wanted_BK & ~spared_BE.gather(1, expert_BK)
            unwanted_BR = F.pad(unwanted_BK, (0, order_BE.shape[1]))
            weight_BR = self._weights(scores_BE, expert_BR, placed_BR | unwanted_BR)
        demand_E = torch.zeros_like(self.target_E, dtype=torch.int64)
        demand_E.scatter_add_(0, expert_BK.flatten(), wanted_BK.flatten().long())
        residual_B = None
        if self.overflow == "residual":
            residual_B = (weight_BK * (wanted_BK & ~placed_BR)).sum(dim=-1)
        sample_A, rank_A = placed_BR.nonzero(as_tuple=True)
        assignments = Assignments.listed(
            sample_A, expert_BR[sample_A, rank_A], weight_BR[sample_A, rank_A], (batch, self.num_experts)
        )
        importance_BE = self._importance(logits_BE)
        if importance_BE is None:  # of all choices, including dropped ones
            importance_BE = torch.zeros_like(logits_BE).scatter(1, expert_BK, weight_BK * wanted_BK)
        drops = Drops(wanted_BK.sum() - placed_BR.sum(), demand_E, residual_B)
        return Routing(assignments, self._gate(logits_BE, load_BE, importance_BE), drops)

    @torch.no_grad()
    def close_to(self, new_E: Tensor, old_E: Tensor) -> None:
        """See GatedRouter; the bias of new experts starts at the smallest one, so that it favours none of them."""
        super().close_to(new_E, old_E)
        if self.bias_rate:
            self.bias_E[new_E] = self.bias_E[old_E].min()

    @torch.no_grad()
    def after_step(self, routing: Routing) -> None:
        """Move the bias by bias_rate towards the target load (Wang 2024, algorithm 1), except in random warm-up."""
        super().after_step(routing)
        if self.bias_rate and routing.learned:
            demand_E = routing.demand_E.float()
            self.bias_E += self.bias_rate * (self.target_E * demand_E.sum() - demand_E).sign()


class SoftmaxFirstRouter(TokenChoiceRouter):
    """A rule whose weights are the softmax over all experts, not renormalised over the chosen ones."""

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        return (scores_BE / self.temperature).softmax(dim=-1).gather(-1, expert_BK)


def renormalised(chosen_BK: Tensor, placed_BK: Tensor | None) -> Tensor:
    """exp(chosen) divided by their sum per sample; placed_BK leaves out dropped choices (None: none are dropped)."""
    if placed_BK is not None:
        chosen_BK = chosen_BK.masked_fill(~placed_BK, torch.finfo(chosen_BK.dtype).min)
    return chosen_BK.softmax(dim=-1)
