"""Base classes of experts, and the experts of a mixture."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatcher import Dispatcher, LocalDispatcher
from ..layers import Alone, run
from ..quantised import Matrix, linear_matrices
from .config import ExpertsConfig


class ExpertKind:
    """A kind of expert.

    place head: one expert behind the frozen ViT, a module built from (in_features, hidden, num_outputs, dropout,
    columns) like LayeredExpert, from (B, D) to (B, C) in the number format of its input. place blocks: all experts of
    one block of the ViT, built from (width, ExpertsConfig, the frozen FFN) and called like Adapters. static_shapes:
    whether that call never waits for the number of tokens of an expert, so that a CUDA graph can capture it.
    fixed_size: whether the backbone determines the number of hidden units.
    """

    place = "head"
    static_shapes: bool = False
    fixed_size = False

    @classmethod
    def check(cls, config: ExpertsConfig) -> None:
        """Raise ValueError for options that this kind does not support."""

    @staticmethod
    def silence(expert: nn.Module) -> None:
        """Make a new expert that is added to a trained mixture output zero at first, if it has a last layer."""
        if isinstance(expert, LayerStack):
            nn.init.zeros_(expert.linears[-1].weight)
            nn.init.zeros_(expert.linears[-1].bias)

    @classmethod
    def work(cls, widths: list[int]) -> int:
        """Multiply-adds of one expert on one sample. widths: inputs, units of each hidden layer, outputs."""
        return sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))

    def output_of(self, expert: int, x_ND: Tensor) -> Tensor:
        """place blocks: the output of one expert for tokens (N, D), without its gate weight.

        Raises ValueError if a kind does not define it.
        """
        raise ValueError(f"{type(self).__name__} has no output_of(): its experts cannot be measured one by one")

    def matrices(self) -> list[Matrix]:
        """place blocks: the matrices of all experts of the block, which `experts.weights` stores in fewer bits.

        Raises ValueError if a kind does not define them.
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
        """Equal for experts that can be computed together, even if they read different features."""
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


@dataclass(frozen=True)
class Part:
    """The owners of a tensor in the state of all experts: one expert, or one slice each, of widths_E along dim."""

    owner: int | None = None
    widths_E: tuple[int, ...] = ()
    dim: int = 0

    def of(self, tensor: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """The parts of these experts in a tensor of all experts, concatenated (None: no parts)."""
        if self.owner is not None:
            return tensor if self.owner in numbers else None
        slices = tensor.split(self.widths_E, self.dim)
        return torch.cat([slices[expert] for expert in numbers], self.dim)


class ExpertSet(ABC):
    """The routed experts of one place, which may be distributed over several processes.

    dispatcher: sends samples to the experts, in this process or in others.
    """

    dispatcher: Dispatcher = LocalDispatcher()

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """The owners of each tensor of the state, by its name in this module when all experts are here."""

    def same_shape(self) -> list[list[str]]:
        """Names of parameters of this process's experts that have the same shape, to be trained as one tensor."""
        return []

    @abstractmethod
    def keep(self, numbers: Sequence[int]) -> None:
        """Keep only these experts in this process, in ascending order; their names in the state do not change.

        Afterwards, load the parameters of experts that were in other processes.
        """


class Experts(ExpertSet, nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape.

    rank_E, expert_E: each expert's position in an order by shape, and the expert at each position; on the device,
    because a CUDA graph cannot copy from the host. If experts are distributed over processes, indices count those of
    this process; their names in the state are those of a single process.
    """

    expert_E: Tensor
    rank_E: Tensor

    def __init__(self, experts: Iterable[nn.Module], grown: Sequence[int] = ()):
        """grown: numbers of experts before each addition; only experts of the same addition are computed together."""
        super().__init__(experts)
        self.grown = tuple(grown)
        self._elsewhere: dict[int, nn.Module] = {}
        self._count()

    def _count(self) -> None:
        device = self.expert_E.device if hasattr(self, "expert_E") else None
        expert_E = torch.tensor([expert for group in self.groups for expert in group], dtype=torch.int64, device=device)
        self.register_buffer("expert_E", expert_E, persistent=False)
        self.register_buffer("rank_E", expert_E.argsort(), persistent=False)

    def __getitem__(self, index: int) -> Any:
        return list(self)[index]

    def parts(self) -> dict[str, Part]:
        known = sorted(self._known().items())
        return {f"{number}.{name}": Part(number) for number, expert in known for name in expert.state_dict()}

    def same_shape(self) -> list[list[str]]:
        """See ExpertSet: a list for each parameter of the experts that form one of `groups` and read all features."""
        numbers, found = [int(number) for number, _ in self.named_children()], []
        for group in self.groups:
            members = [self[index] for index in group]
            if len(group) > 1 and all(isinstance(expert, LayerStack) and expert.columns is None for expert in members):
                names = [name for name, _ in members[0].named_parameters()]
                found += [[f"{numbers[index]}.{name}" for index in group] for name in names]
        return found

    def keep(self, numbers: Sequence[int]) -> None:
        known, device = self._known(), self.expert_E.device
        for number, expert in known.items():
            if number not in numbers:
                _empty(expert, torch.device("meta"))  # takes no memory
            elif number in self._elsewhere:
                _empty(expert, device)
        self._elsewhere = {number: expert for number, expert in known.items() if number not in numbers}
        self._modules.clear()
        self._modules.update({str(number): known[number] for number in numbers})
        for of_others in ("groups", "num_parameters"):
            vars(self).pop(of_others, None)
        self._count()

    def _generation(self, number: int) -> int:
        """The generation of an expert: the number of additions before it (torch.compile lacks bisect_right)."""
        return sum(first <= number for first in self.grown)

    def _known(self) -> dict[int, nn.Module]:
        """All experts by number, in this process or others."""
        return self._elsewhere | {int(number): expert for number, expert in self._modules.items()}

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the experts of each shape (hidden layers and dropout) that were added together."""
        groups: dict[tuple, list[int]] = {}
        for index, (number, expert) in enumerate(self.named_children()):
            shape = expert.shape if isinstance(expert, LayerStack) else (index,)
            shape = (self._generation(int(number)), *shape)
            groups.setdefault(shape, []).append(index)
        return tuple(map(tuple, groups.values()))

    @property
    def generations(self) -> list[list[tuple[int, ...]]]:
        """The groups of each addition."""
        found: dict[int, list[tuple[int, ...]]] = {}
        numbers = [int(number) for number, _ in self.named_children()]
        for group in self.groups:
            found.setdefault(self._generation(numbers[group[0]]), []).append(group)
        return list(found.values())

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights and biases of all experts."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matrices(self, first: int = 0) -> list[Matrix]:
        """The matrices of all experts. first: the number of the first expert."""
        return [m for index, expert in enumerate(self, start=first) for m in linear_matrices(expert, index)]

    def go_together(self, features: int) -> bool:
        """Whether experts of one shape can be computed together: all are LayerStacks, and read all features."""
        return all(
            isinstance(expert, LayerStack) and expert.columns is None and expert[0].in_features == features
            for expert in self
        )


def _empty(expert: nn.Module, device: torch.device) -> None:
    """Give an expert new, uninitialised parameters on a device."""
    for module in expert.modules():
        for name, old in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(old, device=device), old.requires_grad))
    if device.type != "meta":
        expert.to(device)  # its buffers
