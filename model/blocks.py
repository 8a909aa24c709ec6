"""A mixture of experts inside one block of a frozen ViT, in parallel to its FFN."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import NeckConfig
from .distributed import is_split
from .experts import EXPERTS, ExpertsConfig
from .quantised import store
from .routers import ROUTERS, RouterConfig, Routing, build_router


class BlockMixture(nn.Module):
    """Tokens (B, T, D) and the output of the frozen FFN -> this output plus that of the experts, and the routing.

    router.level token: each token chooses its experts, and the samples of the routing are the N = B * T tokens. image:
    the class token (without one, the mean of the patch tokens) chooses for all tokens of its image, and the samples are
    the B images.

    usage_E and warmup_usage_E count, as int64 buffers that are saved with the model, the training assignments of each
    expert by the learned gate and by random warm-up.
    """

    usage_E: Tensor
    warmup_usage_E: Tensor

    def __init__(
        self, width: int, router: RouterConfig, experts: ExpertsConfig, ffn: nn.Module, class_token: bool, prefix: int
    ):
        """ffn: that of the block. class_token: whether the first token is one. prefix: number of tokens before the
        patches.
        """
        super().__init__()
        num_experts = len(experts.sizes)
        self.router = build_router(router, width, num_experts, experts.work(width, width), 1, experts.grown)
        kind: Any = EXPERTS[experts.kind]
        self.experts = kind(width, experts, ffn)
        self.own_norm = experts.norm == "own"
        if experts.quantised:
            store(self.experts.matrices(), experts.formats)
        self.by_image, self.class_token, self.prefix = router.level == "image", class_token, prefix
        self.register_buffer("usage_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("warmup_usage_E", torch.zeros(num_experts, dtype=torch.int64))

    @property
    def static_shapes(self) -> bool:
        """Whether a training step never waits to know how many tokens an expert has."""
        return self.router.static_shapes and self.experts.static_shapes

    def forward(
        self, x_BTD: Tensor, dense_BTD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The sum of the FFN's and the experts' output (B, T, D), and the routing.

        x_BTD: tokens from `normalise`, the input of gate and experts. dense_BTD: the frozen FFN's output.
        warmup: route at random. allowed_E: bool, the experts that may be chosen (None: all).
        """
        routing = self.router(self._read(x_BTD), warmup, allowed_E)
        return self.experts(x_BTD, dense_BTD, routing.assignments), routing

    def normalise(self, x_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """The input of gate and experts, from the tokens before and after the FFN's norm."""
        return F.layer_norm(x_BTD, x_BTD.shape[-1:]) if self.own_norm else normed_BTD

    def _read(self, x_BTD: Tensor) -> Tensor:
        """The gate's input: (N, D)."""
        if not self.by_image:
            return x_BTD.flatten(0, 1)
        return x_BTD[:, 0] if self.class_token else x_BTD[:, self.prefix :].float().mean(dim=1)

    def after_step(self, routing: Routing) -> None:
        """Call once after each optimizer step: updates the loss-free bias, if there is one."""
        self.router.after_step(routing)

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add a training batch to the counters, like `MixtureOfExperts.count`."""
        if is_split():
            return
        counter_E = self.usage_E if routing.learned else self.warmup_usage_E
        counter_E += routing.counts_E


def check_block_parts(neck: NeckConfig, router: RouterConfig, experts: ExpertsConfig) -> None:
    """Raise ValueError if neck, router and experts do not fit a mixture inside the ViT's blocks."""
    rule = ROUTERS[router.kind]
    rule.check(router, len(experts.sizes))
    if EXPERTS[experts.kind].place != "blocks":
        kinds = " or ".join(name for name, kind in EXPERTS.items() if kind.place == "blocks")
        raise ValueError(f"experts.kind {experts.kind} is a class head: with experts.place blocks set {kinds}")
    EXPERTS[experts.kind].check(experts)
    if not rule.token_choice:
        raise ValueError(
            f"router.kind {router.kind} does not work with experts.place blocks, where each token or image chooses its "
            "experts: set a rule of that kind, such as noisy_topk or vmoe"
        )
    for name, given in (
        ("experts.shared", experts.shared),
        ("experts.inputs", experts.inputs is not None),
        ("router.inputs", router.inputs is not None),
    ):
        if given:
            why = "the frozen FFN is the shared expert" if name == "experts.shared" else "gate and experts read tokens"
            raise ValueError(f"{name} does not apply to experts.place blocks, where {why}: leave it out")
    if experts.combine != "logits":
        raise ValueError(f"experts.combine {experts.combine} is for a class head: with experts.place blocks set logits")
    if router.overflow == "residual":
        raise ValueError(
            "router.overflow residual adds a linear head: with experts.place blocks the frozen FFN processes every "
            "token, so set drop or next_best"
        )
    if neck.kind != "pooled":
        raise ValueError(f"neck.kind {neck.kind} needs experts.place head: with blocks the head reads pooled features")
