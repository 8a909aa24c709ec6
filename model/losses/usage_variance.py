"""The usage variance of the reference recipe."""

from torch import Tensor

from ..routing import Routing
from .base import register


@register(
    "usage_variance",
    "Variance of the usage fractions, from the reference recipe: only reported, because it has no gradient.",
)
def variance_of_usage(routing: Routing) -> Tensor:
    return usage_variance(routing.demand_E)


def usage_variance(counts_E: Tensor) -> Tensor:
    """Population variance of the usage fractions (the reference recipe); 0 at perfect balance.

    It is built from counts and has no gradient, so it balances nothing; kept to reproduce that recipe.
    """
    return (counts_E / counts_E.sum().clamp_min(1)).var(correction=0)
