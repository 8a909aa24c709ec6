"""How long a model takes from images to answers."""

import statistics
import time
from collections.abc import Callable

import torch

from model.backbone import Backbone
from model.moe_vit import AnyMoE, MoEViT
from model.preparation import prepare


@torch.no_grad()
def latency(model: AnyMoE, backbone: Backbone, images_BCHW: torch.Tensor, seconds: float = 1.0) -> float:
    """Seconds from uint8 images (B, 3, H, W) on the device to their logits, the frozen ViT included; a median.

    model: in evaluation mode, as predict.py runs it, not compiled. seconds: to spend, about.
    """

    def answer() -> torch.Tensor:
        if isinstance(model, MoEViT):
            return model(images_BCHW)[0]
        return model(backbone(prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std)))[0]

    return median_seconds(answer, images_BCHW.device, seconds)


def median_seconds(run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """The median time of a call, after a first one that loads kernels, from as many as `seconds` allow."""
    times = []
    started = time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - started < seconds and len(times) < 200):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
