"""A mixture of experts as the FFN of a transformer."""

from torch import Tensor, nn

from .experts import ExpertsConfig
from .moe import MixtureOfExperts, check_shape, check_sizes
from .routers import ROUTERS, RouterConfig, Routing


class MoEFFN(nn.Module):
    """Tokens (B, T, D) -> (B, T, D): a transformer's FFN in which each token uses a few of E unequal experts.

    The samples of the routing are the N = B * T tokens. A token dropped by `router.capacity_factor` gives zeros: the
    transformer's residual connection keeps it. Raises ValueError if router and experts do not fit each other or an FFN.
    """

    def __init__(self, width: int, router: RouterConfig, experts: ExpertsConfig):
        super().__init__()
        if ROUTERS[router.kind].reads_tokens:
            raise ValueError(
                f"router.kind {router.kind} gives one output per sample, an FFN needs one per token: set another rule"
            )
        if router.overflow == "residual":
            raise ValueError(
                "router.overflow residual adds a linear layer: in an FFN set drop (the transformer's residual "
                "connection keeps every token) or next_best"
            )
        if experts.combine != "logits":
            raise ValueError(f"experts.combine {experts.combine} is for class logits: in an FFN set logits")
        check_sizes(width=width)
        self.mixture = MixtureOfExperts(width, width, router, experts)

    def forward(self, x_BTD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The output (B, T, D), in the dtype of the input, and the routing.

        warmup: route at random. allowed_E: bool, the experts that may be chosen (None: all).
        """
        check_shape(x_BTD, self.mixture.in_features, "(B, T, {})")
        out_ND, routing = self.mixture(x_BTD.flatten(0, 1), warmup, allowed_E)
        return out_ND.to(x_BTD.dtype).view_as(x_BTD), routing

    def after_step(self, routing: Routing) -> None:
        """Call once after each optimizer step: updates the loss-free bias, if there is one."""
        self.mixture.after_step(routing)
