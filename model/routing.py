"""Routing: the assignments of samples to experts with weights, for dispatch, counters, losses and analysis."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignments:
    """A flat list of A assignments of B samples to E experts.

    sample_A, expert_A: int64. weight_A: float32, weight of the expert's output. counts_E: assignments of each expert,
    int64, no gradient. top_k: k if assignment a belongs to sample a // k (None: some were left out). rows_AD: the input
    of each assignment, if it is not its sample's features. sizes: counts_E, if the host knows them.
    """

    sample_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    num_samples: int
    counts_E: Tensor
    top_k: int | None = None
    rows_AD: Tensor | None = None
    sizes: list[int] | None = None

    @classmethod
    def listed(
        cls,
        sample_A: Tensor,
        expert_A: Tensor,
        weight_A: Tensor,
        shape: tuple[int, int],
        top_k: int | None = None,
        rows_AD: Tensor | None = None,
    ) -> "Assignments":
        """Assignments from lists, with counts; does not wait for a GPU. shape: (B, E)."""
        zeros_E = torch.zeros(shape[1], dtype=torch.int64, device=expert_A.device)
        counts_E = zeros_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))
        return cls(sample_A, expert_A, weight_A, shape[0], counts_E, top_k, rows_AD)

    @classmethod
    def of_each(cls, expert_BK: Tensor, weight_BK: Tensor, num_experts: int) -> "Assignments":
        """Assignments of each sample to its k experts, in order."""
        batch, top_k = expert_BK.shape
        sample_A = torch.arange(batch, device=expert_BK.device).repeat_interleave(top_k)
        return cls.listed(sample_A, expert_BK.flatten(), weight_BK.flatten(), (batch, num_experts), top_k)

    @property
    def num_experts(self) -> int:
        return len(self.counts_E)

    @property
    def weights_BE(self) -> Tensor:
        """The weight of each expert for each sample, float32; 0 if it is not chosen. Differentiable.

        For rules that assign a sample to an expert at most once.
        """
        cell_A = self.sample_A * self.num_experts + self.expert_A
        zeros = self.weight_A.new_zeros(self.num_samples * self.num_experts)
        return zeros.scatter(0, cell_A, self.weight_A).view(self.num_samples, self.num_experts)

    def kept(self, kept_A: Tensor) -> "Assignments":
        """The assignments for which kept_A, bool, is true."""
        sample_A, expert_A, weight_A = self.sample_A[kept_A], self.expert_A[kept_A], self.weight_A[kept_A]
        return Assignments.listed(sample_A, expert_A, weight_A, (self.num_samples, self.num_experts))

    def repeated(self, times: int) -> "Assignments":
        """The same assignments with each sample repeated: sample b becomes b * times to b * times + times - 1."""
        if times == 1:
            return self
        offset_T = torch.arange(times, device=self.sample_A.device)
        if self.top_k is None:
            sample_A = (self.sample_A[:, None] * times + offset_T).flatten()
            expert_A, weight_A = (values_A.repeat_interleave(times) for values_A in (self.expert_A, self.weight_A))
        else:  # so that assignment a still belongs to sample a // k
            sample_A = torch.arange(self.num_samples * times, device=offset_T.device).repeat_interleave(self.top_k)
            expert_A, weight_A = (
                values_A.view(-1, 1, self.top_k).expand(-1, times, -1).flatten()
                for values_A in (self.expert_A, self.weight_A)
            )
        counts = (self.num_samples * times, self.counts_E * times)
        return Assignments(sample_A, expert_A, weight_A, *counts, self.top_k)

    def scaled(self, factor_B: Tensor) -> "Assignments":
        """The same assignments with each sample's weights multiplied by a factor; (B,) factors, or T of them per
        sample.
        """
        repeats = self.num_samples // len(factor_B)
        return replace(self, weight_A=self.weight_A * factor_B.index_select(0, self.sample_A // repeats))

    def by_row(self) -> "Assignments":
        """The same assignments with each row of rows_AD as a separate sample."""
        rows_A = torch.arange(self.sample_A.shape[0], device=self.sample_A.device)
        return replace(self, sample_A=rows_A, num_samples=rows_A.shape[0], top_k=1, rows_AD=None)


@dataclass(frozen=True)
class Gate:
    """The gate of every expert for every sample, for the auxiliary losses.

    logits_BE: clean router logits, float32. tempered_BE: logits_BE at the gate's temperature. load_BE: P(expert is
    chosen) under fresh noise, differentiable, if the rule has noise. importance_BE: the gate that is summed to the
    importance, if that is not the weight. target_E: target load, summing to 1 (None: even). work_E: cost of each expert
    over their mean (None: equal). old_BE: clean logits at its temperature of the gate that the training started from,
    over the experts that it had, no gradient (None: not asked for).
    """

    logits_BE: Tensor
    tempered_BE: Tensor
    load_BE: Tensor | None = None
    importance_BE: Tensor | None = None
    target_E: Tensor | None = None
    work_E: Tensor | None = None
    old_BE: Tensor | None = None


@dataclass(frozen=True)
class Drops:
    """Dropped choices of a training step.

    count: dropped choices, or with expert choice, samples that no expert took; int64 scalar on the device. demand_E:
    assignments of each expert before drops, int64 (None: no difference). residual_B: weight of the choices that a
    linear head replaces (None: none).
    """

    count: Tensor
    demand_E: Tensor | None = None
    residual_B: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The decision of a router for a batch. drops: None if the rule drops nothing.

    learned: False in random warm-up.
    """

    assignments: Assignments
    gate: Gate
    drops: Drops | None = None
    learned: bool = True

    @property
    def num_samples(self) -> int:
        return self.assignments.num_samples

    @property
    def num_experts(self) -> int:
        return self.assignments.num_experts

    @property
    def sample_A(self) -> Tensor:
        return self.assignments.sample_A

    @property
    def expert_A(self) -> Tensor:
        return self.assignments.expert_A

    @property
    def weight_A(self) -> Tensor:
        return self.assignments.weight_A

    @property
    def counts_E(self) -> Tensor:
        """Assignments of each expert, int64, no gradient."""
        return self.assignments.counts_E

    @property
    def logits_BE(self) -> Tensor:
        """Clean router logits, float32."""
        return self.gate.logits_BE

    @property
    def gate_logits_BE(self) -> Tensor:
        """Clean logits at the gate's temperature."""
        return self.gate.tempered_BE

    @property
    def probs_BE(self) -> Tensor:
        """The clean gate: softmax over all experts, at its temperature."""
        return self.gate.tempered_BE.softmax(dim=-1)

    @property
    def dropped(self) -> Tensor | None:
        """Number of dropped choices, int64 scalar on the device; None if the rule drops nothing."""
        return None if self.drops is None else self.drops.count

    @property
    def demand_E(self) -> Tensor:
        """Assignments of each expert before drops, int64, no gradient; balance is measured on them."""
        tokens_before_drop_E = None if self.drops is None else self.drops.demand_E
        return self.counts_E if tokens_before_drop_E is None else tokens_before_drop_E

    @property
    def importance_E(self) -> Tensor:
        """Gate weight that each expert receives, summed over the batch (Shazeer 2017, eq. 6); differentiable."""
        return torch.zeros_like(self.logits_BE[0]).index_add(0, self.expert_A, self.weight_A)
