"""Feed-forward experts of several sizes."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES: dict[str, tuple[list[int], float]] = {
    "small": ([256, 128], 0.3),
    "medium": ([512, 256, 128], 0.4),
    "large": ([1024, 512, 256, 128], 0.5),
    "very_large": ([2048, 1024, 512, 256, 128], 0.6),
}
"""The named sizes: hidden units of each layer, and dropout."""

LIST_DROPOUT = 0.3  # of an expert given as a list of hidden sizes, unless experts.dropout says otherwise


@dataclass
class ExpertsConfig:
    """Experts: how many, how large, and how their outputs are put together."""

    sizes: list[Literal["small", "medium", "large", "very_large"] | list[int]] = field(
        default_factory=lambda: ["small", "medium", "large", "very_large"]
    )
    """One entry an expert: a named size, or its hidden layers such as [512, 256]."""
    dropout: float | None = None
    """Dropout of every expert; null: each named size's own (0.3, 0.4, 0.5, 0.6), and 0.3 for a list."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Mix the experts' logits, or their class probabilities (a mixture distribution, Jacobs 1991)."""
    dispatch: Literal["auto", "sorted", "grouped", "dense"] = "auto"
    """How samples reach their experts, with equal results. sorted: one expert after the other; grouped: experts of one
    shape in one product; dense: every expert on every sample; auto: by size and device."""

    def __post_init__(self):
        if not self.sizes:
            raise ValueError("experts.sizes is empty: name at least one expert")
        for size in self.sizes:
            if isinstance(size, str):
                if size not in SIZES:
                    raise ValueError(
                        f"experts.sizes has '{size}': known sizes are {', '.join(SIZES)}, or a list of ints"
                    )
            elif not size or any(width < 1 for width in size):
                raise ValueError(f"experts.sizes has {size}: hidden layers need 1 unit or more")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"experts.dropout is {self.dropout}: it must be at least 0 and below 1")

    def hidden(self, expert: int) -> list[int]:
        """Hidden units of each layer of one expert."""
        size = self.sizes[expert]
        return SIZES[size][0] if isinstance(size, str) else list(size)

    def dropout_of(self, expert: int) -> float:
        """Dropout of one expert."""
        if self.dropout is not None:
            return self.dropout
        size = self.sizes[expert]
        return SIZES[size][1] if isinstance(size, str) else LIST_DROPOUT

    def labels(self) -> list[str]:
        """A name for each expert in figures: its index and hidden sizes."""
        return [f"{e} · {'-'.join(map(str, self.hidden(e)))}" for e in range(len(self.sizes))]


class Expert(nn.Sequential):
    """Blocks of Linear, LayerNorm, ReLU, Dropout, then a Linear to the classes: (B, D) -> logits (B, C).

    Xavier-uniform weights (Glorot 2010), zero biases. Computes in the number format of its input.
    """

    def __init__(self, in_features: int, hidden: list[int], num_classes: int, dropout: float):
        layers: list[nn.Module] = []
        width = in_features
        for units in hidden:
            layers += [nn.Linear(width, units), nn.LayerNorm(units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        super().__init__(*layers, nn.Linear(width, num_classes))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def widths(self) -> list[int]:
        """Outputs of each linear layer, the classes last."""
        return [layer.out_features for layer in self if isinstance(layer, nn.Linear)]

    def forward(self, x_BD: Tensor) -> Tensor:
        if x_BD.dtype == self[0].weight.dtype:
            return super().forward(x_BD)
        return self.after_first(F.linear(x_BD, *cast(self[0], x_BD.dtype)))

    def after_first(self, h_BH: Tensor) -> Tensor:
        """The rest of the forward pass, from the output of the first linear layer, in its number format.

        Autocast would norm in float32 and so move twice the bytes between layers.
        """
        with torch.autocast(h_BH.device.type, enabled=False):
            for layer in list(self)[1:]:
                if isinstance(layer, nn.Linear):
                    h_BH = F.linear(h_BH, *cast(layer, h_BH.dtype))
                elif isinstance(layer, nn.LayerNorm):
                    h_BH = F.layer_norm(h_BH, layer.normalized_shape, *cast(layer, h_BH.dtype), layer.eps)
                else:
                    h_BH = layer(h_BH)
        return h_BH


def cast(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias in `dtype`, differentiable."""
    return layer.weight.to(dtype), layer.bias.to(dtype)


class Experts(nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape."""

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the experts of each shape (hidden layers and dropout), in order of their first."""
        groups: dict[tuple, list[int]] = {}
        for index, expert in enumerate(self):
            drops = (layer.p for layer in expert if isinstance(layer, nn.Dropout))
            groups.setdefault((*expert.widths, *drops), []).append(index)
        return tuple(map(tuple, groups.values()))

    def read_all(self, features: int) -> bool:
        """Whether every expert reads all of so many features."""
        return all(expert[0].in_features == features for expert in self)


def build_experts(config: ExpertsConfig, in_features: int, num_classes: int) -> Experts:
    """One Expert for each configured size."""
    return Experts(
        Expert(in_features, config.hidden(e), num_classes, config.dropout_of(e)) for e in range(len(config.sizes))
    )
