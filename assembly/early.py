"""Mistakes in the options of a run that are found before its images and its weights are loaded or downloaded."""

from typing import Any

import torch

from assembly.agreement import require_places, require_samples
from common.distributed import world
from common.errors import EnvironmentFault, UserError, one_line
from common.imports import lazy_imports
from common.memory import installed_memory
from config.config import Config
from model.backbone import Backbone
from model.classifier import VisionMoE
from model.moe_vit import MoEViT, resolve_blocks
from model.outline import feature_shape, outline
from tracking.tracker import require_server

CLASSES = 2  # the least; their real number is known only with the images


def check_early(config: Config) -> tuple[int, ...] | None:
    """Raise UserError or EnvironmentFault for what the options alone make impossible; returns the features' shape.

    That is a backbone that does not exist or has no such features, a mixture that does not fit it, a number of
    processes that does not fit either, and tracking on a server that is not configured or does not answer. The shape
    is None if only the loaded backbone or the images show it.
    """
    require_samples(config.train.batch_size)
    require_places(config)
    if world().first:
        require_server(config.tracking)
    with lazy_imports():
        backbone = outline(config.backbone)
    if backbone is None:
        return None
    shape = feature_shape(backbone)
    check_backbone(config, backbone)
    model_parts(config, shape, CLASSES, backbone)
    return shape if config.experts.place == "head" else None


def check_backbone(config: Config, backbone: Backbone) -> None:
    """Raise UserError if the backbone cannot have experts inside."""
    if config.experts.place == "blocks":
        try:
            resolve_blocks(config.experts, backbone)
            if config.train.patch_dropout and getattr(backbone.vit, "rope", None) is not None:
                raise ValueError("train.patch_dropout does not work with rotary position embeddings: set it to 0")
        except ValueError as error:
            raise UserError(one_line(error)) from error


def model_parts(
    config: Config, feature_shape: tuple[int, ...], num_classes: int, backbone: Backbone | None
) -> tuple[Any, tuple[Any, ...]]:
    """The class of the trained part, and its arguments. backbone: as for `build_model`.

    Raises UserError if the configured parts do not fit each other, EnvironmentFault if the weights alone need more
    memory than the machine has.
    """
    configured, groups = (config.neck, config.router, config.experts), len(config.backbone.features)
    if config.experts.place == "blocks":
        kind, parts = MoEViT, (backbone, num_classes, *configured)
    else:
        kind, parts = VisionMoE, (feature_shape, num_classes, *configured, groups)
    try:
        with torch.device("meta"):  # takes no memory
            parameters = sum(value.numel() for value in kind(*parts).parameters())
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"this model cannot be built: {one_line(error)}") from error
    present = installed_memory()
    if present is not None and 4 * parameters > present:
        raise EnvironmentFault(
            f"the weights of this model need {4 * parameters / 1e9:,.0f} GB, the machine has {present / 1e9:,.0f} GB: "
            "use fewer or smaller experts.sizes, or a pooled neck"
        )
    return kind, parts
