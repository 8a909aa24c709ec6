"""Base classes of experts, and the experts of a mixture."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..layers import Alone, run
from ..quantised import Matrix, linear_matrices
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
        """Raise ValueError for options that this kind does not support."""

    @staticmethod
    def silence(expert: nn.Module) -> None:
        """Let a new expert that is added to a trained mixture put out nothing at first, where it has a last layer."""
        if isinstance(expert, LayerStack):
            nn.init.zeros_(expert.linears[-1].weight)
            nn.init.zeros_(expert.linears[-1].bias)

    @classmethod
    def work(cls, widths: list[int]) -> int:
        """Multiply-adds of one expert on one sample. widths: inputs, units of each hidden layer, outputs."""
        return sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))

    def output_of(self, expert: int, x_ND: Tensor) -> Tensor:
        """place blocks: what one expert makes of tokens (N, D), not weighted.

        Raises ValueError where a kind does not say it.
        """
        raise ValueError(f"{type(self).__name__} has no output_of(): its experts cannot be measured one by one")

    def matrices(self) -> list[Matrix]:
        """place blocks: the matrices of all experts of the block, which `experts.weights` stores in fewer bits.

        Raises ValueError where a kind does not say them.
        """
        raise ValueError(f"{type(self).__name__} has no matrices(): set experts.weights float32")


class LayerStack(ExpertKind, nn.Sequential):
    """An expert of layers that can be computed together with experts of the same shape: (B, D) -> (B, C).

    `model.layers` has the supported modules. Computes in the dtype of its input. columns: int64, the features that it
    reads (None: all).
    """

    columns: Tensor | None

    def __init__(self, *layers: nn.Module, columns: Tensor | None = None):
        super().__init__(*layers)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, the output layer last."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    @property
    def shape(self) -> tuple[str, ...]:
        """Equal for experts that can be computed together, whichever features they read."""
        return str(self[0].out_features), *map(str, list(self)[1:])

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD if self.columns is None else x_BD.index_select(-1, self.columns)
        if x_BD.dtype == self[0].bias.dtype:  # not the weight, which may be stored in fewer bits
            return super().forward(x_BD)
        return run(zip(self), x_BD, Alone())


class LayeredExpert(LayerStack, ABC):
    """An expert of hidden layers, then a linear layer to the outputs: (B, D) -> (B, C).

    A subclass defines one hidden layer. Xavier-uniform weights (Glorot 2010), zero biases. columns: int64,
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
        """The modules of one hidden layer, (B, width) -> (B, units); the first is linear."""


class Experts(nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape.

    rank_E, expert_E: each expert's position in an order by shape, and the expert at each position; on the device,
    because a CUDA graph cannot copy from the host.
    """

    expert_E: Tensor
    rank_E: Tensor

    def __init__(self, experts: Iterable[nn.Module], grown: Sequence[int] = ()):
        """grown: numbers of experts before each addition; experts go together with those of their own addition."""
        super().__init__(experts)
        self.grown = tuple(grown)
        expert_E = torch.tensor([expert for group in self.groups for expert in group], dtype=torch.int64)
        self.register_buffer("expert_E", expert_E, persistent=False)
        self.register_buffer("rank_E", expert_E.argsort(), persistent=False)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the experts of each shape (hidden layers and dropout) that were added together."""
        groups: dict[tuple, list[int]] = {}
        for index, expert in enumerate(self):
            shape = expert.shape if isinstance(expert, LayerStack) else (index,)
            shape = (bisect_right(self.grown, index), *shape)
            groups.setdefault(shape, []).append(index)
        return tuple(map(tuple, groups.values()))

    @property
    def generations(self) -> list[list[tuple[int, ...]]]:
        """The groups of each addition."""
        found: dict[int, list[tuple[int, ...]]] = {}
        for group in self.groups:
            found.setdefault(bisect_right(self.grown, group[0]), []).append(group)
        return list(found.values())

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights and biases of all experts."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matrices(self, first: int = 0) -> list[Matrix]:
        """The matrices of all of them. first: the number of the first expert."""
        return [m for index, expert in enumerate(self, start=first) for m in linear_matrices(expert, index)]

    def go_together(self, features: int) -> bool:
        """Whether experts of one shape can be computed together: all are LayerStacks, and read all features."""
        return all(
            isinstance(expert, LayerStack) and expert.columns is None and expert[0].in_features == features
            for expert in self
        )
