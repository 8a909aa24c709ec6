"""A trained run as one module: what its file for other programs computes."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.trained import TrainedRun
from model.moe_vit import MoEViT
from model.preparation import preparation, resize_and_normalise
from model.routers import Router, Routing

OUTPUTS = ("probabilities", "experts", "weights")


class ImagesToAnswers(nn.Module):
    """uint8 images (B, 3, H, W) -> class probabilities (B, C), experts and their weights, the heaviest first.

    Experts behind the ViT: experts and weights (B, K), K the router's top_k. A rule that gives a sample more or fewer
    has K = E. Inside it: (B, L, K) for its L blocks, and where each token chooses, K = E and a weight is the mean over
    the image's tokens. An expert of weight 0 has no part in the answer; in its place stands -1. A mixture on top of
    experts inside the ViT computes, and is not told of.
    """

    def __init__(self, trained: TrainedRun):
        super().__init__()
        self.backbone, self.model = trained.backbone, trained.model
        self.inside = isinstance(trained.model, MoEViT)
        # Made here, since it is kept for others to use, which a tensor of an exporter's is not good for.
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
    """The most experts that an image can have. whole: it chooses as one, not each of its tokens."""
    return router.top_k if whole and router.fixed_k and router.token_choice else router.num_experts


def _heaviest(routing: Routing, images: int, most: int) -> tuple[Tensor, Tensor]:
    """The experts of each image, int64 (B, K), and their weights, float32 (B, K): means over the image's tokens."""
    cell_A = routing.sample_A * routing.num_experts + routing.expert_A
    zeros = routing.weight_A.new_zeros(routing.num_samples * routing.num_experts)
    table_BTE = zeros.index_add(0, cell_A, routing.weight_A).view(images, -1, routing.num_experts)
    weights_BK, experts_BK = table_BTE.mean(dim=1).topk(most, dim=-1)
    return torch.where(weights_BK > 0, experts_BK, -1), weights_BK


def in_float32(trained: TrainedRun) -> TrainedRun:
    """The same run, whose frozen ViT computes in float32 whatever its configuration says, as its file does."""
    trained.backbone.dtype = torch.float32
    return trained


@torch.no_grad()
def traced(trained: TrainedRun) -> torch.export.ExportedProgram:
    """The graph of `ImagesToAnswers`, of any number of images at the side of the run's data set.

    A graph has no sizes that depend on what is in a tensor, so that each expert computes all samples, and the gate's
    weights choose among them. Raises what torch.export does.
    """
    graph = ImagesToAnswers(trained)
    graph.model = copy.deepcopy(trained.model)
    for module in graph.modules():
        if hasattr(module, "dispatch_mode"):
            module.dispatch_mode = "plain"
    side = trained.config.data.side
    images_BCHW = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(graph.eval(), (images_BCHW,), dynamic_shapes=dynamic, strict=False)
