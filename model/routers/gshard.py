"""GShard's gate."""

from typing import ClassVar

import torch
from torch import Tensor

from ..distributed import rand_like
from .config import register
from .token_choice import TokenChoiceRouter


@register("gshard", "the best two experts, the second with a probability (Lepikhin 2020)")
class GShardRouter(TokenChoiceRouter):
    """GShard (Lepikhin 2020, algorithm 1): the best two experts, their probabilities renormalised over the two.

    In training the second is used with probability 2 g2, where g2 <= 1/2 is its renormalised gate; the first keeps its
    weight. Evaluation uses both.
    """

    only_top_k = 2
    paper: ClassVar = {"router.capacity_factor": 2.0}

    def _wanted(self, weight_BK: Tensor) -> Tensor | None:
        if not self.training:
            return None
        second_B = 2 * weight_BK[:, 1].detach() > rand_like(weight_BK[:, 1])
        return torch.stack([torch.ones_like(second_B), second_B], dim=-1)
