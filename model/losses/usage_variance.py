"""The usage variance of the reference recipe."""

from torch import Tensor

from ..routing import Routing
from .base import register


@register(
    "usage_variance",
    "The reference recipe's variance of the usage fractions: reported, but it has no gradient and balances nothing.",
)
def variance_of_usage(routing: Routing) -> Tensor:
    return usage_variance(routing.demand_E)


def usage_variance(counts_E: Tensor) -> Tensor:
    """Population variance of the usage fractions (the reference recipe); 0 at perfect balance.

    It is built from counts and has no gradient: kept to reproduce that recipe, it balances nothing.
    """
    return (counts_E / counts_E.sum().clamp_min(1)).var(correction=0)
