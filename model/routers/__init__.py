"""Routers: who sees whom, with what weight. One class per routing rule; each returns a Routing."""

from ..routing import Routing
from .base import Router, group_columns
from .config import RouterConfig
from .expert_choice import ExpertChoiceRouter
from .hash import HashRouter
from .hierarchical import HierarchicalRouter
from .rules import (
    ArticleRouter,
    DeepSeekRouter,
    GShardRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SwitchRouter,
    VMoERouter,
    load_probability,
)
from .soft import SoftMoERouter

__all__ = ["ROUTERS", "Router", "RouterConfig", "Routing", "build_router", "group_columns", "load_probability"]

ROUTERS: dict[str, type[Router]] = {
    "article": ArticleRouter,
    "noisy_topk": NoisyTopKRouter,
    "vmoe": VMoERouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "mixtral": MixtralRouter,
    "deepseek": DeepSeekRouter,
    "hierarchical": HierarchicalRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "soft_moe": SoftMoERouter,
}


def build_router(
    config: RouterConfig, in_features: int, num_experts: int, work: list[float] | None = None, num_groups: int = 1
) -> Router:
    """The router that `config.kind` names.

    work: relative cost of each expert (None: equal). num_groups: equally wide groups of features, which
    router.inputs names. Raises ValueError where the configuration does not fit.
    """
    return ROUTERS[config.kind](in_features, num_experts, config, work, num_groups)
