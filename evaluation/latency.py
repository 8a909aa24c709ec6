"""The latency of a model, from images to predictions."""

import copy
import statistics
import time
from collections.abc import Callable

import torch

from common.errors import say
from model.backbone import Backbone
from model.moe_vit import AnyMoE, MoEViT
from model.offload import Stays
from model.preparation import prepare

BATCHES = (1, 256)
ROUNDS, SLOW = 5, 5.0


def latencies(
    model: AnyMoE, backbone: Backbone, images_NCHW: torch.Tensor, wanted: bool | None = None, seconds: float = 0.5
) -> dict[str, float | None]:
    """`latency` of each of BATCHES on a GPU and on a CPU, such as latency_gpu_1; None if it is not measured.

    images_NCHW: source of the images. wanted: measure on the model's device and, if that is a GPU, also on the CPU in
    float32; None: only on a GPU. seconds: approximate time per measurement. Experts in host memory stay there.
    """
    found: dict[str, float | None] = {f"latency_{kind}_{batch}": None for kind in ("gpu", "cpu") for batch in BATCHES}
    device = next(backbone.parameters()).device
    if not (wanted or (wanted is None and device.type == "cuda")):
        return found
    pairs = [(model, backbone)]
    if wanted and device.type == "cuda" and not any(isinstance(module, Stays) for module in model.modules()):
        pairs.append(on_cpu(model, backbone))
    for kind, pair in zip(("gpu", "cpu") if device.type == "cuda" else ("cpu",), pairs, strict=False):
        for batch in BATCHES:
            if kind == "cpu" and batch > 1:
                say(f"measuring the latency of {batch} images on the CPU")
            images_BCHW = images_NCHW[torch.arange(batch) % len(images_NCHW)].to(device if kind == "gpu" else "cpu")
            found[f"latency_{kind}_{batch}"] = latency(*pair, images_BCHW, seconds)
    return found


def on_cpu(model: AnyMoE, backbone: Backbone) -> tuple[AnyMoE, Backbone]:
    """Copies of a model and its backbone that compute on the CPU, in float32."""
    frozen = copy.deepcopy(backbone).cpu()
    frozen.dtype = torch.float32
    return (model.on(frozen) if isinstance(model, MoEViT) else copy.deepcopy(model).cpu()), frozen


@torch.no_grad()
def latency(model: AnyMoE, backbone: Backbone, images_BCHW: torch.Tensor, seconds: float = 1.0) -> float:
    """`typical_seconds` from uint8 images (B, 3, H, W) on the device to their logits, including the frozen ViT.

    model: in evaluation mode, as predict.py runs it, not compiled. seconds: approximate time of the measurement.
    """

    def answer() -> torch.Tensor:
        if isinstance(model, MoEViT):
            return model(images_BCHW)[0]
        return model(backbone(prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std)))[0]

    return typical_seconds(answer, images_BCHW.device, seconds)


def typical_seconds(run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """The time of a call: the lowest of the medians of ROUNDS rounds, since other work on the machine can only add.

    seconds: to spend, after a warm-up of a quarter of it. A call of more than SLOW seconds is timed once, without.
    """

    def timed() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    started, first, times = time.perf_counter(), timed(), []
    if first > max(SLOW, seconds):
        return first
    while time.perf_counter() - started < seconds / 4:
        timed()
    started = time.perf_counter()
    while not times or (time.perf_counter() - started < seconds and len(times) < 1000):
        times.append(timed())
    size = max(1, len(times) // ROUNDS)
    return min(statistics.median(times[first : first + size]) for first in range(0, len(times) - size + 1, size))
