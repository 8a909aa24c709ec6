"""Hash routing: a fixed function of the sample."""

from typing import ClassVar

import torch
from torch import Tensor

from ..norm import Standardise
from ..routing import Routing
from .config import RouterConfig, register
from .token_choice import TokenChoiceRouter


@register("hash", "a fixed random projection, nothing is learned (Roller 2021)")
class HashRouter(TokenChoiceRouter):
    """Hash layers (Roller 2021): a fixed function of the input chooses the experts, each with weight 1/k.

    The function is a random projection of the features to E numbers, drawn once and saved, of which the k largest are
    chosen: a locality-sensitive hash. (A hash of the sample's index would not work for new images.) It has no
    parameters. Features and projections are standardised by running statistics, in training too, so that the hash of a
    sample does not depend on its batch and the loads are about even; the statistics settle in the first hundred steps.
    `warmup` has no effect.
    """

    grows = False
    learns = False
    warms_up = False
    paper: ClassVar = {"balance.switch": 0.0}
    projection_DE: Tensor

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        self.register_buffer("projection_DE", torch.randn(width, self.num_experts) / width**0.5)
        self.scale = Standardise(self.num_experts, affine=False, by_running=True)

    def forward(self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> Routing:
        """See `Router.forward`; the hash is also used in warm-up."""
        return super().forward(x_BD, warmup=False, allowed_E=allowed_E)

    @torch.no_grad()
    def _logits(self, hidden_BH: Tensor, noisy: bool) -> tuple[Tensor, None]:
        return self.scale(hidden_BH @ self.projection_DE), None

    def _weights(self, scores_BE: Tensor, expert_BK: Tensor, placed_BK: Tensor | None = None) -> Tensor:
        allowed_BK = scores_BE.gather(-1, expert_BK).isfinite()
        placed_BK = allowed_BK if placed_BK is None else allowed_BK & placed_BK
        return placed_BK / placed_BK.sum(dim=-1, keepdim=True).clamp_min(1)
