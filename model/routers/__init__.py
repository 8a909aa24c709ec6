"""Routers assign samples to experts, with weights. Each rule is one file that registers itself."""

from collections.abc import Sequence

from ..registry import import_all
from ..routing import Routing
from .base import Router, group_columns
from .config import ROUTERS, RouterConfig, register

import_all(__name__, __path__)

__all__ = ["ROUTERS", "Router", "RouterConfig", "Routing", "build_router", "group_columns", "register"]


def build_router(
    config: RouterConfig,
    in_features: int,
    num_experts: int,
    work: list[float] | None = None,
    num_groups: int = 1,
    grown: Sequence[int] = (),
) -> Router:
    """The router that `config.kind` names.

    work: relative cost of each expert (None: equal). num_groups: number of equally wide feature groups, which
    router.inputs refers to. grown: numbers of experts before each addition (Router.grow). Raises ValueError if the
    configuration does not fit.
    """
    router = ROUTERS[config.kind](in_features, num_experts, config, work, num_groups)
    if grown:
        router.grow(grown, config)
    return router
