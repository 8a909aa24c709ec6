"""What kinds of experts have in common, and the experts of a mixture."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..layers import Alone, run
from .config import ExpertsConfig


class ExpertKind:
    """A kind of experts.

    place head: one expert behind the frozen ViT, a module built from (in_features, hidden, num_outputs, dropout,
    columns) as LayeredExpert is, from (B, D) to (B, C) in the number format of its input. place blocks: all experts of
    one block of the ViT, built from (width, ExpertsConfig, the frozen FFN) and called as Adapters is. static_shapes:
    whether that call never waits to know how many tokens an expert has, so that a CUDA graph can hold it.
    """

    place = "head"
    static_shapes: bool = False

    @classmethod
    def check(cls, config: ExpertsConfig) -> None:
        """Raise ValueError for options that do not go with this kind."""

    @classmethod
    def work(cls, widths: list[int]) -> int:
        """Multiply-adds of one expert on one sample. widths: inputs, units of each hidden layer, outputs."""
        return sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))


class LayerStack(ExpertKind, nn.Sequential):
    """An expert made of layers that can be computed together with those of its shape: (B, D) -> (B, C).

    See `model.layers` for the modules that can. Computes in the number format of its input. columns: int64, the
    features that it reads (None: all).
    """

    columns: Tensor | None

    def __init__(self, *layers: nn.Module, columns: Tensor | None = None):
        super().__init__(*layers)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers with a matrix, the one to the outputs last."""
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


class LayeredExpert(LayerStack, ABC):
    """An expert of hidden layers, then a linear layer to the outputs: (B, D) -> (B, C).

    A kind says what one hidden layer is made of. Xavier-uniform weights (Glorot 2010), zero biases. columns: int64,
    the features that this expert reads (None: all).
    """

    def __init__(
        self, in_features: int, hidden: list[int], num_outputs: int, dropout: float, columns: Tensor | None = None
    ):
        layers: list[nn.Module] = []
        width = in_features if columns is None else len(columns)
        for units in hidden:
            layers += self.hidden_layer(width, units, dropout)
            width = units
        super().__init__(*layers, nn.Linear(width, num_outputs), columns=columns)
        for layer in self.linears:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @staticmethod
    @abstractmethod
    def hidden_layer(width: int, units: int, dropout: float) -> list[nn.Module]:
        """The modules of one hidden layer, (B, width) -> (B, units), the first of them linear."""


class Experts(nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape.

    rank_E, expert_E: each expert's place where those of one shape stand together, and the expert at each place; kept
    on the device, because a copy from the host is no part of a CUDA graph.
    """

    expert_E: Tensor
    rank_E: Tensor

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__(experts)
        expert_E = torch.tensor([expert for group in self.groups for expert in group], dtype=torch.int64)
        self.register_buffer("expert_E", expert_E, persistent=False)
        self.register_buffer("rank_E", expert_E.argsort(), persistent=False)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the experts of each shape (hidden layers and dropout), in order of their first."""
        groups: dict[tuple, list[int]] = {}
        for index, expert in enumerate(self):
            shape = expert.shape if isinstance(expert, LayerStack) else (index,)
            groups.setdefault(shape, []).append(index)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def num_parameters(self) -> int:
        """Weights and biases of all of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def go_together(self, features: int) -> bool:
        """Whether experts of one shape can be computed together: all have layers, and read all of so many features."""
        return all(
            isinstance(expert, LayerStack) and expert.columns is None and expert[0].in_features == features
            for expert in self
        )
