"""A trained run that is ready for prediction."""

from dataclasses import dataclass

import torch

from config.config import Config
from model.backbone import Backbone
from model.moe_vit import AnyMoE
from model.offload import Traffic
from storage.folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """A loaded run, ready for prediction; `model` is in evaluation mode. traffic: of experts in host memory, if any."""

    run: RunFolder
    config: Config
    device: torch.device
    backbone: Backbone
    model: AnyMoE
    class_names: tuple[str, ...]
    traffic: Traffic | None = None
