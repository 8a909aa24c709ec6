"""Feed-forward experts of several sizes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from .layers import Alone, run
from .options import WIDEST
from .routers import group_columns

Size = Literal["small", "medium", "large", "very_large"] | list[int]

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
    """Experts: where they are, how many, how large, and how their outputs are put together."""

    place: Literal["head", "blocks"] = "head"
    """head: behind the frozen ViT, on its features; blocks: inside its blocks, beside each one's frozen FFN."""
    blocks: Literal["all"] | list[int] = "all"
    """place blocks: the blocks that have experts, counted from 0, negative ones from the end; all: every one that
    backbone.features depend on."""
    kind: Literal["mlp", "adapter", "ffn"] = "mlp"
    """mlp: a class head (place head); adapter: down, GELU, up, of one hidden layer, which adds nothing at the start;
    ffn: a copy of the block's own FFN (sparse upcycling, Komatsuzaki 2022), which starts as the dense ViT."""
    sizes: list[Size] = field(default_factory=lambda: ["small", "medium", "large", "very_large"])
    """One entry an expert: a named size, or its hidden layers such as [512, 256]; [] is a linear expert."""
    shared: list[Size] = field(default_factory=list)
    """Experts that every sample passes beside those it is routed to, as sizes; their logits are added to the mixture's
    (Dai 2024)."""
    dropout: float | list[float] | None = None
    """Dropout of every expert, or one number for each of sizes and then of shared; null: each named size's own (0.3,
    0.4, 0.5, 0.6), and 0.3 for a list."""
    inputs: list[list[int]] | None = None
    """For each of sizes, and then of shared, which of backbone.features it reads, counted from 0; null: all."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Mix the experts' logits, or their class probabilities (a mixture distribution, Jacobs 1991)."""
    dispatch: Literal["auto", "sorted", "grouped", "dense"] = "auto"
    """How samples reach their experts, with equal results. sorted: one expert after the other; grouped: experts of one
    shape in one product; dense: every expert on every sample; auto: by size and device."""

    def __post_init__(self):
        if not self.sizes:
            raise ValueError("experts.sizes is empty: name at least one expert")
        if self.place == "head" and self.kind != "mlp":
            raise ValueError(f"experts.kind {self.kind} is an expert inside the ViT: set experts.place blocks, or mlp")
        if self.blocks == []:
            raise ValueError("experts.blocks is empty: name at least one block, or all")
        for name in ("sizes", "shared"):
            for size in getattr(self, name):
                _check_size(f"experts.{name}", size)
        count = len(self.sizes) + len(self.shared)
        for name in ("dropout", "inputs"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(
                    f"experts.{name} has {len(value)} entries for {count} experts ({len(self.sizes)} in experts.sizes, "
                    f"{len(self.shared)} in experts.shared): give one for each"
                )
        for rate in self.dropout if isinstance(self.dropout, list) else [self.dropout]:
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"experts.dropout is {rate}: it must be at least 0 and below 1")
        if self.inputs is not None and self.dispatch == "grouped":
            raise ValueError("experts.dispatch grouped cannot serve experts.inputs: use auto, sorted or dense")
        for groups in self.inputs or []:
            if not groups or len(set(groups)) < len(groups):
                raise ValueError(f"experts.inputs has {groups}: an expert reads at least one feature, each once")

    def hidden(self, expert: int) -> list[int]:
        """Hidden units of each layer of one expert; the shared ones are counted after the others."""
        size = (self.sizes + self.shared)[expert]
        return SIZES[size][0] if isinstance(size, str) else list(size)

    def dropout_of(self, expert: int) -> float:
        """Dropout of one expert."""
        if self.dropout is not None:
            return self.dropout[expert] if isinstance(self.dropout, list) else self.dropout
        size = (self.sizes + self.shared)[expert]
        return SIZES[size][1] if isinstance(size, str) else LIST_DROPOUT

    def labels(self) -> list[str]:
        """A name for each routed expert in figures: its index and hidden sizes."""
        return [f"{e} · {self._units(e)}" for e in range(len(self.sizes))]

    def shared_labels(self) -> list[str]:
        """The hidden sizes of each shared expert."""
        return [self._units(len(self.sizes) + e) for e in range(len(self.shared))]

    def _units(self, expert: int) -> str:
        return "-".join(map(str, self.hidden(expert))) or "linear"

    def work(self, in_features: int, num_classes: int, num_groups: int = 1) -> list[float]:
        """Multiply-adds of each routed expert on one sample: what `router.target_load size` goes by."""
        costs = []
        for expert in range(len(self.sizes)):
            read = in_features if self.inputs is None else in_features // num_groups * len(self.inputs[expert])
            widths = [read, *self.hidden(expert), num_classes]
            costs.append(float(sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))))
        return costs


def _check_size(name: str, size: str | list[int]) -> None:
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"{name} has '{size}': known sizes are {', '.join(SIZES)}, or a list of ints")
    elif not all(1 <= width <= WIDEST for width in size):
        raise ValueError(f"{name} has {size}: hidden layers have from 1 to {WIDEST:,} units")


class Expert(nn.Sequential):
    """Blocks of Linear, LayerNorm, ReLU, Dropout, then a Linear to the classes: (B, D) -> logits (B, C).

    Xavier-uniform weights (Glorot 2010), zero biases. Computes in the number format of its input. columns: int64, the
    features that this expert reads (None: all).
    """

    def __init__(
        self, in_features: int, hidden: list[int], num_classes: int, dropout: float, columns: Tensor | None = None
    ):
        layers: list[nn.Module] = []
        width = in_features if columns is None else len(columns)
        for units in hidden:
            layers += [nn.Linear(width, units), nn.LayerNorm(units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        super().__init__(*layers, nn.Linear(width, num_classes))
        self.register_buffer("columns", columns, persistent=False)
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers with a matrix, the one to the classes last."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    @property
    def shape(self) -> tuple[str, ...]:
        """What experts have in common that can be computed together, whichever features they read."""
        return str(self[0].out_features), *map(str, list(self)[1:])

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD if self.columns is None else x_BD.index_select(-1, self.columns)
        if x_BD.dtype == self[0].weight.dtype:
            return super().forward(x_BD)
        return run(zip(self), x_BD, Alone())


class Experts(nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape.

    rank_E, expert_E: each expert's place where those of one shape stand together, and the expert at each place; kept
    on the device, because a copy from the host is no part of a CUDA graph.
    """

    def __init__(self, experts: Iterable[Expert]):
        super().__init__(experts)
        expert_E = torch.tensor([expert for group in self.groups for expert in group], dtype=torch.int64)
        self.register_buffer("expert_E", expert_E, persistent=False)
        self.register_buffer("rank_E", expert_E.argsort(), persistent=False)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the experts of each shape (hidden layers and dropout), in order of their first."""
        groups: dict[tuple, list[int]] = {}
        for index, expert in enumerate(self):
            groups.setdefault(expert.shape, []).append(index)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def num_parameters(self) -> int:
        """Weights and biases of all of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def read_all(self, features: int) -> bool:
        """Whether every expert reads all of so many features."""
        return all(expert.columns is None and expert[0].in_features == features for expert in self)


def build_experts(
    config: ExpertsConfig, in_features: int, num_classes: int, num_groups: int = 1
) -> tuple[Experts, nn.ModuleList]:
    """The routed experts, one for each of `sizes`, and the shared ones.

    num_groups: equally wide groups of features, which `inputs` names. Raises ValueError for one that is not there.
    """
    experts = []
    for index in range(len(config.sizes) + len(config.shared)):
        columns = None if config.inputs is None else group_columns(in_features, num_groups, config.inputs[index])
        hidden, dropout = config.hidden(index), config.dropout_of(index)
        experts.append(Expert(in_features, hidden, num_classes, dropout, columns))
    return Experts(experts[: len(config.sizes)]), nn.ModuleList(experts[len(config.sizes) :])
