"""Feed-forward experts of several sizes."""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

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

    Xavier-uniform weights (Glorot 2010), zero biases.
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


def build_experts(config: ExpertsConfig, in_features: int, num_classes: int) -> nn.ModuleList:
    """One Expert for each configured size."""
    return nn.ModuleList(
        Expert(in_features, config.hidden(e), num_classes, config.dropout_of(e)) for e in range(len(config.sizes))
    )
