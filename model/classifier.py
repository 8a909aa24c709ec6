"""VisionMoE: a neck that turns frozen features into one vector a sample, and a mixture of experts on it."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.norm import Standardise
from model.routers import RouterConfig, Routing


@dataclass
class NeckConfig:
    """Neck: what is trained between the frozen features and the mixture."""

    kind: Literal["pooled", "attention", "flatten"] = "pooled"
    """pooled: normalise pooled features; flatten: normalise tokens and flatten them; attention: LayerNorm,
    self-attention over the tokens, residual, LayerNorm, flatten."""
    norm: Literal["layer", "batch", "none"] = "layer"
    """pooled: normalisation of the features."""
    dropout: float = 0.0
    """Dropout on the vector that the gate and the experts read."""
    heads: int = 8
    """attention: number of heads."""

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"neck.dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.heads < 1:
            raise ValueError(f"neck.heads is {self.heads}: it must be at least 1")

    @property
    def needs_tokens(self) -> bool:
        """Whether the neck reads token sequences (B, T, D)."""
        return self.kind != "pooled"


class PooledNeck(nn.Module):
    """Normalise pooled features: (B, F) -> (B, F)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig):
        super().__init__()
        (self.out_features,) = shape
        norms = {"layer": nn.LayerNorm, "batch": Standardise, "none": nn.Identity}
        self.norm = norms[config.norm](self.out_features)

    def forward(self, features_BF: Tensor) -> Tensor:
        return self.norm(features_BF)


class FlattenNeck(nn.Module):
    """Normalise each token and flatten: (B, T, D) -> (B, T * D)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig):
        super().__init__()
        tokens, width = shape
        self.out_features = tokens * width
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.norm(tokens_BTD).flatten(1)


class AttentionNeck(nn.Module):
    """LayerNorm, multi-head self-attention over the tokens, residual, LayerNorm, flatten: (B, T, D) -> (B, T * D)."""

    def __init__(self, shape: tuple[int, ...], config: NeckConfig):
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


NECKS = {"pooled": PooledNeck, "flatten": FlattenNeck, "attention": AttentionNeck}


class VisionMoE(nn.Module):
    """Everything that is trained: frozen features (B, F) or tokens (B, T, D) -> class logits (B, C).

    feature_shape: shape of one sample's features. Raises ValueError where neck and features do not fit.
    """

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        num_classes: int,
        neck: NeckConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
    ):
        super().__init__()
        expected = 2 if neck.needs_tokens else 1
        if len(feature_shape) != expected:
            raise ValueError(f"neck.kind {neck.kind} reads {expected}-dimensional features, not {feature_shape}")
        self.neck = NECKS[neck.kind](feature_shape, neck)
        self.dropout = nn.Dropout(neck.dropout)
        self.moe = MixtureOfExperts(self.neck.out_features, num_classes, router, experts)

    def forward(
        self, features: Tensor, warmup: bool = False, allowed_E: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Logits (B, C) in float32 and the routing; `warmup` routes at random, `allowed_E` bars experts."""
        x_BD = self.dropout(self.neck(features.float()))
        return self.moe(x_BD, warmup, allowed_E)
