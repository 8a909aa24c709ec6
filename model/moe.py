"""MixtureOfExperts: router, experts, dispatch and usage counters."""

from itertools import chain
from numbers import Integral

import torch
from torch import Tensor, nn

from .dispatch import COMBINE, run_experts, send
from .distributed import is_split
from .experts import ExpertsConfig, build_experts
from .quantised import linear_matrices, store
from .routers import ROUTERS, RouterConfig, Routing, build_router


class MixtureOfExperts(nn.Module):
    """Features (B, D), or tokens (B, T, D), -> class logits (B, C); each sample uses a few of E unequal experts.

    Shared experts process every sample (the mean of its tokens), and their logits are added. A class head has no
    residual connection for dropped choices; with `router.overflow residual` a linear head replaces it, only in
    training, because evaluation drops nothing.

    usage_E and warmup_usage_E, int64 buffers that are saved with the model, count the training samples of each expert
    in learned routing and in random warm-up, separately, because random routing would hide a collapsed gate.
    """

    usage_E: Tensor
    warmup_usage_E: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        router: RouterConfig,
        experts: ExpertsConfig,
        num_groups: int = 1,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes, num_groups=num_groups)
        check_mixture(router, experts)
        self.in_features = in_features
        num_experts = len(experts.sizes)
        work = experts.work(in_features, num_classes, num_groups)
        self.router = build_router(router, in_features, num_experts, work, num_groups, experts.grown)
        self.experts, self.shared = build_experts(experts, in_features, num_classes, num_groups)
        shared = (linear_matrices(expert, num_experts + index) for index, expert in enumerate(self.shared))
        store([*self.experts.matrices(), *chain.from_iterable(shared)], experts.formats)
        self.skip = nn.Linear(in_features, num_classes) if router.overflow == "residual" else None
        self.combine, self.dispatch_mode = COMBINE[experts.combine], experts.dispatch
        self.register_buffer("usage_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("warmup_usage_E", torch.zeros(num_experts, dtype=torch.int64))

    @property
    def static_shapes(self) -> bool:
        """Whether a training step never waits to know how many samples an expert has."""
        return self.router.static_shapes and self.dispatch_mode in ("auto", "dense")

    def forward(
        self, x_BD: Tensor, warmup: bool = False, allowed_E: Tensor | None = None, static: bool = False
    ) -> tuple[Tensor, Routing]:
        """Logits (B, C) in float32 and the routing.

        warmup: route at random. allowed_E: bool, the experts that may be chosen (None: all). static: dispatch with
        static shapes for a CUDA graph, if experts.dispatch is auto.
        """
        check_shape(x_BD, self.in_features, "(B, T, {})" if self.router.reads_tokens else "(B, {})")
        dispatch_mode = "static" if static and self.dispatch_mode == "auto" else self.dispatch_mode
        routing = self.router(x_BD, warmup, allowed_E)
        if self.training:
            self.count(routing)
        chosen = routing.assignments
        pooled_BD = x_BD if x_BD.ndim == 2 else x_BD.mean(dim=1)
        rows = (x_BD, chosen) if chosen.rows_AD is None else (chosen.rows_AD, chosen.by_row())
        received = send(*rows, self.experts)
        # The shared experts compute while rows are in transit to other processes.
        early = [] if self.experts.dispatcher.local else [expert(pooled_BD) for expert in self.shared]
        logits_BC = self.combine(*run_experts(received, self.experts, dispatch_mode), chosen)
        for shared_BC in early or (expert(pooled_BD) for expert in self.shared):
            logits_BC = logits_BC + shared_BC.float()
        residual_B = None if routing.drops is None else routing.drops.residual_B
        if residual_B is not None and self.skip is not None:
            logits_BC = logits_BC + residual_B[:, None] * self.skip(pooled_BD).float()
        return logits_BC, routing

    def after_step(self, routing: Routing) -> None:
        """Call once after each optimizer step: updates the loss-free bias, if there is one."""
        self.router.after_step(routing)

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add a training batch to the counters.

        This does nothing in the forward pass of a batch shared by several processes, which is counted as a whole.
        """
        if is_split():
            return
        counter_E = self.usage_E if routing.learned else self.warmup_usage_E
        counter_E += routing.counts_E


def check_shape(x: Tensor, width: int, shape: str) -> None:
    """Raise ValueError for a tensor of another shape, or of integers.

    shape: the expected one, such as "(B, {})", with `width` last.
    """
    if x.ndim != shape.count(",") + 1 or x.shape[-1] != width:
        raise ValueError(f"the mixture of experts reads a tensor of shape {shape.format(width)}, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"the mixture of experts reads floating-point numbers, not {x.dtype}: convert them first")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size, by its name, that is not a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} is {size!r}: give a whole number of at least 1")


def check_mixture(router: RouterConfig, experts: ExpertsConfig) -> None:
    """Raise ValueError if router and experts behind the ViT do not fit each other."""
    if experts.place != "head":
        raise ValueError(f"experts.place {experts.place} is not behind the ViT: MoEViT has experts inside it")
    rule = ROUTERS[router.kind]
    rule.check(router, len(experts.sizes))
    scale = rule.only_scales(router, len(experts.sizes))
    if experts.combine == "probabilities" and scale is not None:
        raise ValueError(
            f"experts.combine probabilities with {scale} gives the gate no gradient, because a single weight scales "
            f"all probabilities equally: use logits, or {scale.replace('1', '2')}"
        )
    if experts.combine == "probabilities" and router.overflow == "residual":
        raise ValueError("router.overflow residual adds logits: set experts.combine logits, or another overflow")
