"""From a configuration to its parts: device, features, model."""

from dataclasses import dataclass

import torch

from data.augment import prepare
from data.datasets import Splits
from data.features import FeatureBank
from engine.config import Config
from errors import UserError
from model.backbone import Backbone
from model.classifier import VisionMoE


def pick_device(name: str) -> torch.device:
    """The torch device for `device`. Raises errors.UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} GPU(s); use --device cpu"
        )
    return device


@dataclass(frozen=True)
class Extractor:
    """uint8 images (B, 3, H, W) -> the backbone's features (B, ...), on the images' device."""

    backbone: Backbone

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        backbone = self.backbone
        return backbone(prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std))


def build_bank(config: Config, splits: Splits, backbone: Backbone, device: torch.device) -> FeatureBank:
    """The features of `splits` under `backbone`."""
    return FeatureBank(splits, Extractor(backbone), config.augment, config.features, device)


def build_model(config: Config, feature_shape: tuple[int, ...], num_classes: int) -> VisionMoE:
    """The trained part, on the CPU. Raises errors.UserError where the configured parts do not fit each other."""
    try:
        return VisionMoE(feature_shape, num_classes, config.neck, config.router, config.experts)
    except ValueError as error:
        raise UserError(str(error)) from error
