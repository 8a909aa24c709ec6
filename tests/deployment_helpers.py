"""Runs of tiny ViTs, created without training, for export and offloading."""

from pathlib import Path

import torch
from block_helpers import moe_vit, spread, tiny_vit

from config.config import config_from_dict
from evaluation.trained import TrainedRun
from model.backbone import Backbone
from model.classifier import VisionMoE
from storage.folder import RunFolder

CPU = torch.device("cpu")
SIZES = [[4], [8], [6, 5], []]


def config(**sections):
    """A configuration on digits with the features and sizes below, and the given sections."""
    values = {"data": {"name": "digits"}, "backbone": {"name": "bundled/vit_micro", "features": ["cls:1", "mean:2"]}}
    values |= {"router": {"warmup_steps": 0}, "experts": {"sizes": SIZES}, "balance": {"switch": 0.0}}
    return config_from_dict({name: {**values.get(name, {}), **sections.get(name, {})} for name in values | sections})


def behind(vit: str = "plain", **sections) -> TrainedRun:
    """A run with experts behind a tiny ViT, whose gate has preferences and whose norms know some features."""
    found = config(**sections)
    torch.manual_seed(0)
    backbone = Backbone(tiny_vit(vit), found.backbone.features)
    images_BCHW = torch.rand(64, 3, 8, 8)
    features = backbone(images_BCHW)
    groups = len(found.backbone.features)
    model = VisionMoE(features.shape[1:], 5, found.neck, found.router, found.experts, groups)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.train()
    with torch.no_grad():
        for _ in range(20):  # running statistics
            model(features)
    return TrainedRun(RunFolder(Path("run")), found, CPU, backbone, model.eval(), tuple("abcde"))


def inside(vit: str = "plain", **sections) -> TrainedRun:
    """A run with experts inside the blocks of a tiny ViT."""
    sizes = sections.get("experts", {}).get("sizes", [[2], [4], [6]])
    experts = {"place": "blocks", "kind": "adapter", "sizes": sizes} | sections.pop("experts", {})
    router = {"kind": "noisy_topk", "top_k": 2} | sections.pop("router", {})
    found = config(experts=experts, router=router, backbone={"features": ["mean:1", "mean:2"]}, **sections)
    model = spread(moe_vit(tiny_vit(vit), experts=experts, **router)).eval()
    return TrainedRun(RunFolder(Path("run")), found, CPU, model.backbone, model, tuple("abcde"))
