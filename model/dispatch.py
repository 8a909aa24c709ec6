"""Dispatch and combine: sort assignments by expert, run each expert once on just its samples, mix the outputs."""

import torch
from torch import Tensor, nn

from model.routers import Routing


def dispatch(x_BD: Tensor, routing: Routing, experts: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Run every expert once on the samples assigned to it; an expert without samples does not run.

    Returns (outputs (A, C), order_A): outputs are sorted by expert, and row i belongs to assignment
    order_A[i] of the routing.
    """
    order_A = torch.argsort(routing.expert_A, stable=True)
    sorted_AD = x_BD[routing.sample_A[order_A]]
    # The sizes of the slices must be known to the host: the one place a step waits for the device.
    counts = routing.counts_E.tolist()
    slices = sorted_AD.split(counts)
    outputs = [expert(part) for expert, part, count in zip(experts, slices, counts, strict=True) if count]
    return torch.cat(outputs), order_A


def combine_logits(outputs_AC: Tensor, order_A: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of the experts' logits, float32 (B, C); zeros for a sample that no expert saw."""
    weighted_AC = outputs_AC.float() * routing.weight_A[order_A, None]
    zeros_BC = weighted_AC.new_zeros(routing.num_samples, outputs_AC.shape[1])
    return zeros_BC.index_add(0, routing.sample_A[order_A], weighted_AC)


def combine_probabilities(outputs_AC: Tensor, order_A: Tensor, routing: Routing) -> Tensor:
    """Log of the weighted sum of the experts' class probabilities, float32 (B, C), up to a constant a sample.

    A mixture distribution (Jacobs 1991), whose cross-entropy is the mixture's negative log-likelihood where
    the weights of a sample sum to 1. Computed as a log-sum-exp over each sample's experts; zeros for a sample
    that no expert saw.
    """
    sample_A = routing.sample_A[order_A]
    # A softmax weight may underflow to 0, whose logarithm has no finite gradient.
    weight_A1 = routing.weight_A[order_A, None].clamp_min(torch.finfo(torch.float32).tiny)
    log_AC = outputs_AC.float().log_softmax(dim=-1) + weight_A1.log()
    index_AC = sample_A[:, None].expand_as(log_AC)
    zeros_BC = log_AC.new_zeros(routing.num_samples, log_AC.shape[1])
    peak_BC = zeros_BC.scatter_reduce(0, index_AC, log_AC.detach(), "amax", include_self=False)
    sum_BC = zeros_BC.index_add(0, sample_A, (log_AC - peak_BC[sample_A]).exp())
    unseen_B1 = torch.ones_like(zeros_BC[:, :1]).index_fill(0, sample_A, 0.0)
    return (sum_BC + unseen_B1).log() + peak_BC


COMBINE = {"logits": combine_logits, "probabilities": combine_probabilities}
