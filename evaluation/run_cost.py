"""The cost of a run: training time, and parameters and FLOPs per image."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from common.meter import duration
from evaluation.cost import cost, parameters, trained_cost
from model.backbone import Backbone
from model.moe_vit import AnyMoE

NAMES = {
    "total_parameters": "parameters, total",
    "trained_parameters": "parameters, trained",
    "active_parameters": "parameters, active",
    "flops": "FLOPs per image",
    "memory_bytes": "weights in memory",
    "latency_gpu_1": "latency of 1 image, GPU",
    "latency_gpu_256": "latency of 256 images, GPU",
    "latency_cpu_1": "latency of 1 image, CPU",
    "latency_cpu_256": "latency of 256 images, CPU",
    "training_seconds": "training time",
    "images_per_second": "images/s in training",
    "peak_memory_gib": "peak memory",
    "kept_epoch": "kept epoch",
}
"""The values of `run_cost`, in words."""
LEGEND = (
    "Active parameters: trained parameters used per test image, on average. FLOPs: per image, with the backbone; a "
    "multiply-add counts as two. Training time: all epochs with validation, and the extraction of features. Images/s: "
    "of the median epoch, training only. Peak memory: of the GPU, or of the process on a CPU. Weights in memory: "
    "the backbone, in its compute format, and all trained weights. Latency: from images to predictions, "
    "backbone included."
)


def run_cost(
    model: AnyMoE,
    backbone: Backbone | None,
    feature_shape: tuple[int, ...],
    load_E: np.ndarray,
    history: Sequence[dict[str, Any]],
    kept_epoch: int | None,
    latency: dict[str, float | None] | None = None,
) -> dict[str, float | None]:
    """The values of NAMES, and the number of trained `epochs`; None if unknown.

    backbone: None if it is not available. load_E: share of the assignments on the test images. history: the lines of
    metrics.jsonl. latency: what `latencies` measured (None: nothing).
    """
    active = trained_cost(model, feature_shape, load_E)
    whole = cost(model, backbone, feature_shape) if backbone else None
    seconds = _column(history, "speed/epoch_seconds")
    return {
        "total_parameters": whole and whole.total_parameters,
        "trained_parameters": parameters(model),
        "active_parameters": active.active_parameters,
        "flops": whole and whole.backbone_flops + active.flops,
        "head_flops": active.flops,
        "memory_bytes": backbone and weights_in_memory(model, backbone),
        **{name: (latency or {}).get(name) for name in NAMES if name.startswith("latency")},
        "training_seconds": sum(seconds) if len(seconds) == len(history) > 0 else None,
        "images_per_second": median(_column(history, "speed/images_per_second") or [None]),
        "peak_memory_gib": max(_column(history, "speed/peak_memory_gib"), default=None),
        "kept_epoch": kept_epoch,
        "epochs": history[-1]["epoch"] if history else None,
    }


def shown(name: str, value: float | None) -> str:
    """A value of NAMES, formatted."""
    if value is None:
        return "–"
    if name == "training_seconds":
        return duration(value)
    if name == "peak_memory_gib":
        return f"{value:.1f} GiB"
    if name == "memory_bytes":
        return f"{value / 2**20:,.1f} MiB"
    if name.startswith("latency"):
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{value:,.0f}" if name in ("images_per_second", "kept_epoch") else si(value)


def weights_in_memory(model: AnyMoE, backbone: Backbone) -> int:
    """Bytes of the weights and buffers used for prediction: of the ViT in its compute format, and of the rest."""
    runner = backbone.runner(next(backbone.parameters()).device)
    return sum(value.nbytes for part in (runner, model) for value in part.state_dict().values())


def si(value: float) -> str:
    """1234567 as "1.23 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def _column(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in history if line.get(key) is not None]
