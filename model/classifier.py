"""VisionMoE: a neck that turns frozen features into one vector per sample, and a mixture of experts on top."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from .experts import ExpertsConfig
from .moe import MixtureOfExperts, check_mixture
from .norm import EachNorm, Standardise
from .options import check_options
from .routers import ROUTERS, RouterConfig, Routing


@dataclass
class NeckConfig:
    """Neck: trained layers between the frozen features and the mixture."""

    kind: Literal["pooled", "attention", "flatten", "tokens"] = "pooled"
    """pooled: normalise pooled features; flatten: normalise tokens and flatten them; attention: LayerNorm,
    self-attention over the tokens, residual, LayerNorm, flatten; tokens: normalise tokens and keep them (soft_moe)."""
    norm: Literal["layer", "batch", "each", "none"] = "layer"
    """pooled: normalisation of the features; layer: all features together; each: each of backbone.features separately,
    so that a mean over patches counts as much as a class token."""
    dropout: float = 0.0
    """Dropout on the input of gate and experts."""
    heads: int = 8
    """attention: number of heads."""

    def __post_init__(self):
        check_options(self, "neck")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"neck.dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.heads < 1:
            raise ValueError(f"neck.heads is {self.heads}: it must be at least 1")

    @property
    def needs_tokens(self) -> bool:
        """Whether the neck reads token sequences (B, T, D)."""
        return self.kind != "pooled"


class PooledNeck(nn.Module):
    """Normalise pooled features: (B, F) -> (B, F). num_groups: number of equally wide features in F."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig, num_groups: int = 1):
        super().__init__()
        (self.out_features,) = shape
        each = partial(EachNorm, num_groups=num_groups)
        norms = {"layer": nn.LayerNorm, "batch": Standardise, "each": each, "none": nn.Identity}
        self.norm = norms[config.norm](self.out_features)

    def forward(self, features_BF: Tensor) -> Tensor:
        return self.norm(features_BF)


class FlattenNeck(nn.Module):
    """Normalise each token and flatten: (B, T, D) -> (B, T * D)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig, num_groups: int = 1):
        super().__init__()
        tokens, width = shape
        self.out_features = tokens * width
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.norm(tokens_BTD).flatten(1)


class AttentionNeck(nn.Module):
    """LayerNorm, multi-head self-attention over the tokens, residual, LayerNorm, flatten: (B, T, D) -> (B, T * D)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig, num_groups: int = 1):
        super().__init__()
        tokens, width = shape
        if width % config.heads:
            raise ValueError(f"neck.heads {config.heads} does not divide the token width {width}")
        self.out_features = tokens * width
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        normed_BTD = self.norm(tokens_BTD)
        mixed_BTD, _ = self.attention(normed_BTD, normed_BTD, normed_BTD, need_weights=False)
        return self.norm_out(tokens_BTD + mixed_BTD).flatten(1)


class TokensNeck(nn.Module):
    """Normalise each token and keep them all: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig, num_groups: int = 1):
        super().__init__()
        self.out_features = shape[1]
        self.norm = nn.LayerNorm(shape[1])

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.norm(tokens_BTD)


NECKS = {"pooled": PooledNeck, "flatten": FlattenNeck, "attention": AttentionNeck, "tokens": TokensNeck}


class VisionMoE(nn.Module):
    """The trained part: frozen features (B, F) or tokens (B, T, D) -> class logits (B, C).

    feature_shape: shape of one sample's features. num_groups: number of equally wide features (backbone.features) in
    them. Raises ValueError if the parts do not fit each other.
    """

    places = ("head",)

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        num_classes: int,
        neck: NeckConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        num_groups: int = 1,
    ):
        super().__init__()
        check_parts(neck, router, experts)
        self.first_new = experts.first_new
        expected = 2 if neck.needs_tokens else 1
        if len(feature_shape) != expected:
            raise ValueError(f"neck.kind {neck.kind} reads {expected}-dimensional features, not {feature_shape}")
        self.neck = NECKS[neck.kind](feature_shape, neck, num_groups)
        self.dropout = nn.Dropout(neck.dropout)
        self.moe = MixtureOfExperts(self.neck.out_features, num_classes, router, experts, num_groups)

    @property
    def static_shapes(self) -> bool:
        """Whether a training step never waits to know how many samples an expert has."""
        return self.moe.static_shapes

    def forward(
        self, features: Tensor, warmup: bool = False, allowed_E: Tensor | None = None, static: bool = False
    ) -> tuple[Tensor, tuple[Routing]]:
        """Logits (B, C) in float32, and the routing at each place.

        warmup: route at random. allowed_E: bool, the experts that may be chosen (None: all). static: dispatch with
        static shapes for a CUDA graph, if experts.dispatch is auto.
        """
        x_BD = self.dropout(self.neck(features.float()))
        logits_BC, routing = self.moe(x_BD, warmup, allowed_E, static)
        return logits_BC, (routing,)

    @property
    def mixtures(self) -> tuple[MixtureOfExperts]:
        """The mixture at each of `places`."""
        return (self.moe,)

    def after_step(self, routings: tuple[Routing]) -> None:
        """Call once after each optimizer step: updates the loss-free bias, if there is one."""
        self.moe.after_step(routings[0])


def check_parts(neck: NeckConfig, router: RouterConfig, experts: ExpertsConfig) -> None:
    """Raise ValueError if neck, router and experts behind the ViT do not fit each other."""
    check_mixture(router, experts)
    rule = ROUTERS[router.kind]
    if rule.reads_tokens and neck.kind != "tokens":
        raise ValueError(
            f"router.kind {router.kind} mixes patch tokens, which neck.kind {neck.kind} does not keep: set neck.kind "
            "tokens and backbone.features [tokens:-1]"
        )
    if neck.kind == "tokens" and not rule.reads_tokens:
        raise ValueError(
            f"neck.kind tokens keeps patch tokens, but router.kind {router.kind} reads one vector per sample: "
            "set neck.kind attention or flatten, or router.kind soft_moe"
        )
    if neck.kind != "pooled" and (router.inputs is not None or experts.inputs is not None):
        raise ValueError(
            f"router.inputs and experts.inputs choose among pooled features, which neck.kind {neck.kind} does not give"
        )
