"""The cost of a model: parameters and FLOPs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.backbone import Backbone
from model.classifier import VisionMoE
from model.moe_vit import AnyMoE, MoEViT
from model.quantised import num_parameters, part_bytes, part_numbers


@dataclass(frozen=True)
class Cost:
    """Parameters, and floating-point operations of one sample's forward pass (a multiply-add counts as two).

    backbone_parameters are frozen, trainable_parameters are the rest. active_parameters (the trainable ones that one
    sample uses) and head_flops are means under an even load of the experts.
    """

    backbone_parameters: int
    trainable_parameters: int
    active_parameters: int
    backbone_flops: int
    head_flops: int

    @property
    def total_parameters(self) -> int:
        return self.backbone_parameters + self.trainable_parameters

    def lines(self) -> list[str]:
        """The summary printed when training starts."""
        return [
            f"parameters   {self.total_parameters:,} in total, {self.trainable_parameters:,} trainable, "
            f"{self.active_parameters:,} of these active per sample",
            f"per sample   {_si(self.backbone_flops)} in the frozen backbone, "
            f"{_si(self.head_flops)} in the trained part",
        ]


@dataclass(frozen=True)
class HeadCost:
    """Active parameters and FLOPs of one sample, without the backbone."""

    active_parameters: int
    flops: int


def trained_cost(model: AnyMoE, feature_shape: tuple[int, ...], load_E: np.ndarray | None = None) -> HeadCost:
    """Cost of the trained part per image, as means under the load (None: even)."""
    return inside_cost(model, load_E) if isinstance(model, MoEViT) else head_cost(model, feature_shape, load_E)


def head_cost(model: VisionMoE, feature_shape: tuple[int, ...], load_E: np.ndarray | None = None) -> HeadCost:
    """Cost of the trained part per sample, as means under the load: fractions of the assignments (None: even).

    A linear head for dropped choices in training is not counted as active.
    """
    moe = model.moe
    num_experts = len(moe.experts)
    load_E = np.full(num_experts, 1 / num_experts) if load_E is None else np.asarray(load_E)
    per_expert_E = np.array([parameters(expert) for expert in moe.experts])
    device = next(model.parameters()).device
    features = torch.zeros(1, *feature_shape, device=device)
    row_BD = torch.zeros(1, model.neck.out_features, device=device)
    gate_input = torch.zeros(1, feature_shape[0], model.neck.out_features) if moe.router.reads_tokens else row_BD
    expert_flops_E = np.array([flops(expert, row_BD) for expert in moe.experts])
    always = flops(model.neck, features) + flops(moe.router, gate_input.to(device))
    always += sum(flops(expert, row_BD) for expert in moe.shared)
    # Assignments of a sample to each expert; in soft routing, several slots of one expert reuse its weights.
    visits_E = moe.router.experts_per_sample * load_E
    fixed = parameters(model) - per_expert_E.sum() - (parameters(moe.skip) if moe.skip else 0)
    return HeadCost(
        active_parameters=round(fixed + float(visits_E.clip(max=1) @ per_expert_E)),
        flops=round(always + float(visits_E @ expert_flops_E)),
    )


def inside_cost(model: MoEViT, load_E: np.ndarray | None = None) -> HeadCost:
    """Cost per image of the trained part in and behind the ViT, means under the load of every block (None: even)."""
    mixtures, tokens, device = model.mixtures[: len(model.blocks)], model.num_tokens, next(model.parameters()).device
    num_experts = mixtures[0].router.num_experts
    load_E = np.full(num_experts, 1 / num_experts) if load_E is None else np.asarray(load_E)
    visits_E = mixtures[0].router.experts_per_sample * load_E
    parameters_E = np.array([row.parameters for row in expert_costs(model)])
    flops_E = np.array([mixtures[0].experts.flops_of(expert) for expert in range(num_experts)]) * tokens
    read_ND = torch.zeros(1 if mixtures[0].by_image else tokens, model.width, device=device)
    always = len(mixtures) * flops(mixtures[0].router, read_ND)
    on_top = model.mixtures[-1] if model.head is None else model.head
    always += flops(on_top, torch.zeros(1, model.neck.out_features, device=device))
    return HeadCost(
        active_parameters=round(parameters(model) - parameters_E.sum() + float(visits_E.clip(max=1) @ parameters_E)),
        flops=round(always + len(mixtures) * float(visits_E @ flops_E)),
    )


@dataclass(frozen=True)
class ExpertCost:
    """Parameters and bytes of an expert, in all blocks that have it, and FLOPs of one assignment to it."""

    parameters: int
    bytes: int
    flops: int


def expert_costs(model: AnyMoE) -> list[ExpertCost]:
    """Parameters, bytes and FLOPs of each routed expert."""
    if isinstance(model, MoEViT):
        tokens = model.num_tokens if model.mixtures[0].by_image else 1
        each = [mixture.experts for mixture in model.mixtures[: len(model.blocks)]]
        return [
            ExpertCost(
                sum(experts.parameters_of(e) for experts in each),
                sum(_bytes_inside(experts, e) for experts in each),
                tokens * each[0].flops_of(e),
            )
            for e in range(model.mixtures[0].router.num_experts)
        ]
    x_BD = torch.zeros(1, model.neck.out_features, device=next(model.parameters()).device)
    sizes = [sum(v.numel() * v.element_size() for v in expert.state_dict().values()) for expert in model.moe.experts]
    return [
        ExpertCost(parameters(expert), size, flops(expert, x_BD))
        for expert, size in zip(model.moe.experts, sizes, strict=True)
    ]


def _bytes_inside(experts: Any, expert: int) -> int:
    """Bytes of one expert of a block: its matrices in their stored format, and everything else in float32."""
    count = experts.parameters_of(expert)
    try:
        matrices = experts.matrices()
    except ValueError:  # a kind from a plug-in, whose matrices are stored as trained
        return 4 * count
    others = count - sum(part_numbers(matrix, expert) for matrix in matrices)
    return 4 * others + sum(part_bytes(matrix, expert) for matrix in matrices)


def cost(model: AnyMoE, backbone: Backbone, feature_shape: tuple[int, ...]) -> Cost:
    """Count parameters and FLOPs of backbone and head, the latter as `head_cost` does under an even load."""
    size = backbone.image_size
    head = trained_cost(model, feature_shape)
    return Cost(
        backbone_parameters=parameters(backbone),
        trainable_parameters=parameters(model),
        active_parameters=head.active_parameters,
        backbone_flops=flops(backbone, torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)),
        head_flops=head.flops,
    )


def parameters(module: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return num_parameters(module)


@torch.no_grad()
def flops(module: nn.Module, inputs: torch.Tensor) -> int:
    """FLOPs of one forward pass in evaluation mode: matrix products, convolutions and those of attention.

    Attention is counted as its two matrix products on every device: PyTorch's counter knows the fused kernels on a GPU,
    but misses those on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because importing it takes a quarter of a second

    was_training = module.training
    module.eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused kernel is unknown to the counter
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    module.train(was_training)
    return counter.get_total_flops()


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:.3g} TFLOP"
