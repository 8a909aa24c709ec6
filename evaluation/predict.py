"""Runs a trained model on a split and collects the data for scores and figures."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.meter import meter
from evaluation.block_routing import BlockRoutingSums
from evaluation.predictions import Predictions, Removals
from evaluation.together import batches_lacking, own_part, together
from features.bank import FeatureBank
from features.images import ImageBank
from model.classifier import VisionMoE
from model.moe_vit import AnyMoE, MoEViT
from model.routers import Routing
from model.spread import is_spread


@torch.no_grad()
def predict(model: AnyMoE, bank: FeatureBank | ImageBank, split: str, removals: bool = False) -> Predictions:
    """Predictions for every image of a split without augmentation, with the learned gate and without noise.

    Experts on features run in float32 regardless of the training precision, so that a prediction does not depend on its
    batch beyond rounding. Several processes share the work. removals: in the same pass, also compute the predictions
    without each expert.
    """
    was_training = model.training
    model.eval()
    inside = isinstance(model, MoEViT)
    answers, flat, gates, without = [], [], [], []
    sums, seen = BlockRoutingSums(model.block_places if isinstance(model, MoEViT) else model.places), 0
    samples = len(bank.splits[split])
    own_N = own_part(samples)
    with meter(split, len(own_N)) as done:
        for inputs, labels_B in bank.batches(split, bank.evaluation_batch, own_N):
            logits_BC, routings = model(inputs)
            if isinstance(model, MoEViT):  # a mixture on top is not analysed
                routings = routings[: len(model.blocks)]
            answers.append((logits_BC, labels_B))
            if inside:
                sums.add(routings, len(labels_B))
                gates.append(_mean_gate(routings, len(labels_B)).log())
            else:
                (routing,) = routings
                flat.append((routing.sample_A + seen, routing.expert_A, routing.weight_A))
                gates.append(routing.gate_logits_BE)
            if removals and routings[0].num_experts > 1:
                remove = _without_each_inside if inside else _without_each
                without.append(remove(model, inputs, logits_BC, routings))
            seen += len(labels_B)
            done(len(labels_B))
        if is_spread(model):
            for _ in range(batches_lacking(samples, bank.evaluation_batch)):
                model(inputs)  # the experts of this process must compute for other processes
    model.train(was_training)
    blocks = sums.result() if inside else None
    routing = blocks.heaviest() if inside else _columns(flat)
    gate_NE = torch.cat(gates).cpu().numpy()
    own = Predictions(*_columns(answers), *routing, gate_NE, _join(without) if without else None, blocks)
    return together(own, samples)


def _columns(batches: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
    return [torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True)]


def _mean_gate(routings: Sequence[Routing], images: int) -> Tensor:
    """The mean gate of each image's tokens in all blocks, (B, E)."""
    each = [routing.probs_BE.view(images, -1, routing.num_experts).mean(dim=1) for routing in routings]
    return torch.stack(each).mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny)


def _without_each(
    model: VisionMoE, features: Tensor, logits_BC: Tensor, routings: Sequence[Routing]
) -> tuple[Tensor, ...]:
    """The columns of `Removals` for one batch. A sample that does not use the expert keeps its prediction."""
    (routing,) = routings
    experts_E = torch.arange(routing.num_experts, device=logits_BC.device)
    predicted_EB = logits_BC.argmax(dim=1).repeat(len(experts_E), 1)
    before_EE, after_EE = torch.zeros(2, len(experts_E), len(experts_E), dtype=torch.int64)
    for expert in range(len(experts_E)):
        served_B = torch.zeros(routing.num_samples, dtype=torch.bool, device=logits_BC.device)
        served_B[routing.sample_A[(routing.expert_A == expert) & (routing.weight_A > 0)]] = True
        if not served_B.any():
            continue
        logits_MC, (rerouted,) = model(features[served_B], allowed_E=experts_E != expert)
        predicted_EB[expert, served_B] = logits_MC.argmax(dim=1)
        before_EE[expert] = _visits(routing, served_B[routing.sample_A])
        after_EE[expert] = _visits(rerouted)
    return predicted_EB, before_EE, after_EE


def _without_each_inside(
    model: MoEViT, images: Tensor, logits_BC: Tensor, routings: Sequence[Routing]
) -> tuple[Tensor, ...]:
    """The columns of `Removals` for one batch, each expert removed from all blocks at once."""
    experts_E = torch.arange(routings[0].num_experts, device=logits_BC.device)
    before_E = sum(_visits(routing) for routing in routings)
    predicted, after = [], []
    for expert in range(len(experts_E)):
        without_BC, rerouted = model(images, allowed_E=experts_E != expert)
        predicted.append(without_BC.argmax(dim=1))
        after.append(sum(_visits(routing) for routing in rerouted[: len(routings)]))
    return torch.stack(predicted), before_E.repeat(len(experts_E), 1), torch.stack(after)


def _visits(routing: Routing, among_A: Tensor | None = None) -> Tensor:
    """Assignments of positive weight to each expert."""
    counted_A = routing.weight_A > 0
    counted_A = routing.expert_A[counted_A if among_A is None else counted_A & among_A]
    return torch.bincount(counted_A, minlength=routing.num_experts).cpu()


def _join(without: list[tuple[Tensor, ...]]) -> Removals:
    predicted_EB, before_EE, after_EE = zip(*without, strict=True)
    tables = (torch.cat(predicted_EB, dim=1), torch.stack(before_EE).sum(dim=0), torch.stack(after_EE).sum(dim=0))
    return Removals(*(table.cpu().numpy() for table in tables))
