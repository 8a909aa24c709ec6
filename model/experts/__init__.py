"""Experts of several sizes. Each kind is one file that registers itself."""

from typing import Any

from torch import nn

from ..registry import import_all
from ..routers import group_columns
from .base import ExpertKind, Experts, ExpertSet, LayeredExpert, LayerStack, Part
from .config import EXPERTS, SIZES, ExpertsConfig, register

import_all(__name__, __path__)

__all__ = [
    "EXPERTS",
    "SIZES",
    "ExpertKind",
    "ExpertSet",
    "Experts",
    "ExpertsConfig",
    "LayerStack",
    "LayeredExpert",
    "Part",
    "build_experts",
    "register",
]


def build_experts(
    config: ExpertsConfig, in_features: int, num_outputs: int, num_groups: int = 1
) -> tuple[Experts, nn.ModuleList]:
    """The routed experts, one for each of `sizes`, and the shared experts.

    num_groups: number of equally wide feature groups, which `inputs` refers to. Raises ValueError for a missing one.
    """
    kind: Any = EXPERTS[config.kind]
    kind.check(config)
    experts = []
    for index in range(len(config.sizes) + len(config.shared)):
        columns = None if config.inputs is None else group_columns(in_features, num_groups, config.inputs[index])
        hidden, dropout = config.hidden(index), config.dropout_of(index)
        experts.append(kind(in_features, hidden, num_outputs, dropout, columns))
    if config.first_new is not None:
        for expert in experts[config.first_new : len(config.sizes)]:
            kind.silence(expert)
    return Experts(experts[: len(config.sizes)], config.grown), nn.ModuleList(experts[len(config.sizes) :])
