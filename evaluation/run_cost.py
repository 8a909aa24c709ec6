"""The cost of a run: training time, and parameters and FLOPs per image."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from common.meter import duration
from evaluation.cost import cost, trained_cost
from model.backbone import Backbone
from model.moe_vit import AnyMoE

NAMES = {
    "total_parameters": "parameters, total",
    "trained_parameters": "parameters, trained",
    "active_parameters": "parameters, active",
    "flops": "FLOPs an image",
    "training_seconds": "training time",
    "images_per_second": "images/s in training",
    "peak_memory_gib": "peak memory",
    "kept_epoch": "kept epoch",
}
"""What `run_cost` returns, in words."""
LEGEND = (
    "Active parameters: trained parameters that a mean test image uses. FLOPs: of one image, with the backbone; a "
    "multiply-add counts as two. Training time: all epochs with validation, and the extraction of features. Images/s: "
    "of the median epoch, training only. Peak memory: of the GPU, or of the process on a CPU."
)


def run_cost(
    model: AnyMoE,
    backbone: Backbone | None,
    feature_shape: tuple[int, ...],
    load_E: np.ndarray,
    history: Sequence[dict[str, Any]],
    kept_epoch: int | None,
) -> dict[str, float | None]:
    """The figures of NAMES, and `epochs` that were trained; None where that is not known.

    backbone: None where it is not at hand. load_E: share of the assignments on the test images. history: the lines of
    metrics.jsonl.
    """
    active = trained_cost(model, feature_shape, load_E)
    whole = cost(model, backbone, feature_shape) if backbone else None
    seconds = _column(history, "speed/epoch_seconds")
    return {
        "total_parameters": whole and whole.total_parameters,
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": active.active_parameters,
        "flops": whole and whole.backbone_flops + active.flops,
        "head_flops": active.flops,
        "training_seconds": sum(seconds) if len(seconds) == len(history) > 0 else None,
        "images_per_second": median(_column(history, "speed/images_per_second") or [None]),
        "peak_memory_gib": max(_column(history, "speed/peak_memory_gib"), default=None),
        "kept_epoch": kept_epoch,
        "epochs": history[-1]["epoch"] if history else None,
    }


def shown(name: str, value: float | None) -> str:
    """A figure of NAMES as people read it."""
    if value is None:
        return "–"
    if name == "training_seconds":
        return duration(value)
    if name == "peak_memory_gib":
        return f"{value:.1f} GiB"
    return f"{value:,.0f}" if name in ("images_per_second", "kept_epoch") else si(value)


def si(value: float) -> str:
    """1234567 as "1.23 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def _column(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in history if line.get(key) is not None]
