"""Expert capacity: which assignments are kept when each expert has a limited number of slots."""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F


def exact(number: float) -> Fraction:
    """The exact decimal fraction of a number: 0.1 is one tenth, so that no rounding error changes a capacity."""
    return Fraction(str(number))


def expert_capacity(batch: int, per_sample: Fraction, shares: list[Fraction]) -> list[int]:
    """Slots of each expert: ceil(batch * per_sample * target share), from 1 to the whole batch.

    per_sample: k times the capacity factor. With even shares this is ceil(B k c / E), as in V-MoE (Riquelme 2021).
    """
    return [min(batch, max(1, math.ceil(batch * per_sample * share))) for share in shares]


def place(
    expert_BR: Tensor,
    wanted_BK: Tensor,
    capacity_E: Tensor,
    priority_B: Tensor | None = None,
    spare_BS: Tensor | None = None,
) -> Tensor:
    """Assign samples to slots in rounds: all first choices before any second choice.

    expert_BR: each sample's experts in order of preference. wanted_BK: which of the first k it requests. A sample whose
    choice was full continues from round k on with the rest of its row (none for R = k) until it has as many experts as
    it requested; spare_BS: which of them are allowed (None: all). priority_B: larger values come first within a round
    (None: the order of the batch). Returns placed_BR: which of expert_BR the sample got.
    """
    rounds, k = expert_BR.shape[1], wanted_BK.shape[1]
    num_experts = len(capacity_E)
    order_B = None if priority_B is None else priority_B.argsort(descending=True, stable=True)
    used_E = torch.zeros_like(capacity_E)
    missing_B = wanted_BK.sum(dim=-1)
    placed = []
    for turn in range(rounds):
        asks_B = wanted_BK[:, turn] if turn < k else missing_B > 0
        if turn >= k and spare_BS is not None:
            asks_B = asks_B & spare_BS[:, turn - k]
        asks_BE = F.one_hot(expert_BR[:, turn], num_experts) * asks_B[:, None]
        if order_B is None:
            place_BE = asks_BE.cumsum(dim=0)
        else:
            place_BE = torch.empty_like(asks_BE).index_copy_(0, order_B, asks_BE[order_B].cumsum(dim=0))
        fits_BE = (asks_BE > 0) & (place_BE + used_E <= capacity_E)
        used_E = used_E + fits_BE.sum(dim=0)
        placed.append(fits_BE.any(dim=-1))
        missing_B = missing_B - placed[-1].long()
    return torch.stack(placed, dim=-1)
