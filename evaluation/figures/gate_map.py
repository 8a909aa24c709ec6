"""How the gate divides its input space among the experts."""

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import plots
from analysis.gate import discriminant_plane
from evaluation.figures.registry import Evaluated, register
from features.bank import FeatureBank
from model.classifier import VisionMoE
from model.moe_vit import MoEViT
from model.routers.base import FeatureGroups

POINTS = 1500  # test images that are shown, and the same number of validation images to fit the axes
NUMBERS = 50_000_000  # limit of feature values of either in memory
NAMES = 20  # classes that are named


@register(
    "gate_map",
    "Test images by the gate's input, on the two axes of a linear discriminant analysis that separates their main "
    "experts, fitted to the validation images. Names are near the median of their images. Below: for how many images "
    "the nearest expert on this plane is the one that the gate chose.",
    place=60,
)
def gate_map(evaluated: Evaluated) -> Figure | None:
    model, bank, test = evaluated.model, evaluated.bank, evaluated.test
    # Inside the ViT there is a gate in each block.
    if isinstance(model, MoEViT) or model.moe.router.reads_tokens:  # there every expert contributes to every image
        return None
    order_N = _spread(bank, "test", model.neck.out_features)
    shown_ND, expert_N = gate_inputs(model, bank, "test", order_N)
    fitted = gate_inputs(model, bank, "validation", _spread(bank, "validation", model.neck.out_features))
    plane = discriminant_plane(*fitted, shown_ND, expert_N)
    if plane is None:
        return None
    groups = (test.coarse_N, test.coarse_names) if test.coarse_N is not None else (test.labels_N, test.class_names)
    group_N, names = groups if len(groups[1]) <= NAMES else (test.labels_N, ())
    return plots.gate_map(plane, expert_N, evaluated.labels, group_N[order_N].numpy(), names)


def _spread(bank: FeatureBank, split: str, width: int) -> torch.Tensor:
    """Samples spread evenly over a split, few enough for the memory."""
    count = min(len(bank.splits[split]), POINTS, max(3, NUMBERS // width))
    return torch.linspace(0, len(bank.splits[split]) - 1, count).round().long().unique()


@torch.no_grad()
def gate_inputs(
    model: VisionMoE, bank: FeatureBank, split: str, order_N: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The gate's input for samples, (N, D) float32, and the expert with the largest weight per sample, -1 for none."""
    read, heaviest = [], []
    router = model.moe.router
    chosen = [layer for layer in router.trunk if isinstance(layer, FeatureGroups)]

    def keep(_, inputs):
        x_BD = inputs[0].float()
        read.append((chosen[0](x_BD) if chosen else x_BD).cpu())

    hook = router.register_forward_pre_hook(keep)
    try:
        for features, _ in bank.batches(split, 256, order_N):
            (routing,) = model(features)[1]
            weight_BE = routing.assignments.weights_BE
            heaviest.append(torch.where(weight_BE.any(dim=1), weight_BE.argmax(dim=1), -1).cpu())
    finally:
        hook.remove()
    return torch.cat(read).numpy(), torch.cat(heaviest).numpy()
