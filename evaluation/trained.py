"""A trained run, ready to answer for images of any source."""

from dataclasses import dataclass

import torch

from config.config import Config
from model.backbone import Backbone
from model.moe_vit import AnyMoE
from model.offload import Traffic
from storage.folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """What a run needs to answer for images of any source; `model` is in evaluation mode.

    traffic: where its experts are in host memory, what that has come to so far.
    """

    run: RunFolder
    config: Config
    device: torch.device
    backbone: Backbone
    model: AnyMoE
    class_names: tuple[str, ...]
    traffic: Traffic | None = None
