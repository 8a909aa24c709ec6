"""A trained run as one module: the computation of the exported file."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.trained import TrainedRun
from model.moe_vit import MoEViT
from model.preparation import preparation, resize_and_normalise
from model.quantised import Stored, fp8_numbers
from model.routers import Router, Routing

OUTPUTS = ("probabilities", "experts", "weights")


class ImagesToAnswers(nn.Module):
    """uint8 images (B, 3, H, W) -> class probabilities (B, C), experts and weights, sorted by decreasing weight.

    Experts behind the ViT: experts and weights (B, K), where K is the router's top_k; rules with a variable number of
    experts per sample have K = E. Experts inside the ViT: (B, L, K) for L blocks; if each token chooses, K = E and a
    weight is the mean over the image's tokens. Experts with weight 0 do not contribute and are shown as -1. A mixture
    on top of experts inside the ViT is computed, but is not part of these outputs.
    """

    def __init__(self, trained: TrainedRun):
        super().__init__()
        self.backbone, self.model = trained.backbone, trained.model
        self.inside = isinstance(trained.model, MoEViT)
        # Created here, because it is cached for later use, which does not work with a tensor of the exporter.
        side, size = trained.config.data.side, trained.backbone.image_size
        mean, std = trained.backbone.mean, trained.backbone.std
        self.preparation = preparation((side, side, size), mean, std, torch.device("cpu"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixtures: Sequence[Any] = self.model.mixtures
        prepared = resize_and_normalise(images, self.preparation)
        if isinstance(self.model, MoEViT):
            logits_BC, routings = self.model(prepared)
            mixtures = mixtures[: len(self.model.blocks)]
        else:
            logits_BC, routings = self.model(self.backbone(prepared))
        found = [
            _heaviest(routing, images.shape[0], _most(mixture.router, getattr(mixture, "by_image", True)))
            for mixture, routing in zip(mixtures, routings, strict=False)
        ]
        experts, weights = (torch.stack(column, dim=1) for column in zip(*found, strict=True))
        if not self.inside:
            experts, weights = experts[:, 0], weights[:, 0]
        return logits_BC.softmax(dim=-1), experts, weights


def _most(router: Router, whole: bool) -> int:
    """The largest number of experts of an image. whole: the image chooses, not each of its tokens."""
    return router.top_k if whole and router.fixed_k and router.token_choice else router.num_experts


def _heaviest(routing: Routing, images: int, most: int) -> tuple[Tensor, Tensor]:
    """The experts of each image, int64 (B, K), and their weights, float32 (B, K): means over the image's tokens."""
    cell_A = routing.sample_A * routing.num_experts + routing.expert_A
    zeros = routing.weight_A.new_zeros(routing.num_samples * routing.num_experts)
    table_BTE = zeros.index_add(0, cell_A, routing.weight_A).view(images, -1, routing.num_experts)
    weights_BK, experts_BK = table_BTE.mean(dim=1).topk(most, dim=-1)
    return torch.where(weights_BK > 0, experts_BK, -1), weights_BK


def in_float32(trained: TrainedRun) -> TrainedRun:
    """The same run with a frozen ViT in float32, as in the exported file, regardless of its configuration."""
    trained.backbone.dtype = torch.float32
    return trained


@torch.no_grad()
def traced(trained: TrainedRun) -> torch.export.ExportedProgram:
    """The graph of `ImagesToAnswers` for any number of images with the image size of the run's dataset.

    Tensor sizes in a graph cannot depend on tensor values, so each expert processes all samples, and the gate's
    weights select among the outputs. Numbers in fp8 are looked up in a table, because ONNX cannot reinterpret bytes as
    float8. Raises the exceptions of torch.export.
    """
    graph = ImagesToAnswers(trained)
    graph.model = copy.deepcopy(trained.model).requires_grad_(False)  # so the outputs of a loaded file need no detach()
    numbers = fp8_numbers()
    for module in graph.modules():
        if hasattr(module, "dispatch_mode"):
            module.dispatch_mode = "plain"
        if isinstance(module, Stored):
            module.table = numbers
    side = trained.config.data.side
    images_BCHW = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(graph.eval(), (images_BCHW,), dynamic_shapes=dynamic, strict=False)
