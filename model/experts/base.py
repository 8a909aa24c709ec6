"""What kinds of experts have in common, and the experts of a mixture."""

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
from .config import ExpertsConfig


class ExpertKind:
    """A kind of experts.

    place head: one expert behind the frozen ViT, a module built from (in_features, hidden, num_outputs, dropout,
    columns) as LayeredExpert is, from (B, D) to (B, C) in the number format of its input. place blocks: all experts of
    one block of the ViT, built from (width, ExpertsConfig, the frozen FFN) and called as Adapters is.
    """

    place = "head"

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


@dataclass(frozen=True)
class Part:
    """Whose a tensor of the state of all experts is: one expert's, or a slice each, of widths_E along dim."""

    owner: int | None = None
    widths_E: tuple[int, ...] = ()
    dim: int = 0

    def of(self, tensor: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """What these experts have of a tensor of all experts, one after the other (None: nothing)."""
        if self.owner is not None:
            return tensor if self.owner in numbers else None
        slices = tensor.split(self.widths_E, self.dim)
        return torch.cat([slices[expert] for expert in numbers], self.dim)


class ExpertSet(ABC):
    """The routed experts of one place, which may be spread over several processes.

    dispatcher: brings samples to the experts, here or elsewhere.
    """

    dispatcher: Dispatcher = LocalDispatcher()

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """Whose each tensor of the state is, by its name in this module when all experts are here."""

    @abstractmethod
    def keep(self, numbers: Sequence[int]) -> None:
        """Have only these experts in this process, in ascending order; their names in the state stay as they are.

        The parameters of those that were elsewhere are to be loaded then.
        """


class Experts(ExpertSet, nn.ModuleList):
    """The experts of a mixture, and which of them have the same shape.

    rank_E, expert_E: each expert's place where those of one shape stand together, and the expert at each place; kept
    on the device, because a copy from the host is no part of a CUDA graph. Where the experts are spread over
    processes, indices count those that are here; their names in the state are those of one process.
    """

    expert_E: Tensor
    rank_E: Tensor

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__(experts)
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

    def keep(self, numbers: Sequence[int]) -> None:
        known, device = self._known(), self.expert_E.device
        for number, expert in known.items():
            if number not in numbers:
                _empty(expert, torch.device("meta"))  # which takes no memory
            elif number in self._elsewhere:
                _empty(expert, device)
        self._elsewhere = {number: expert for number, expert in known.items() if number not in numbers}
        self._modules.clear()
        self._modules.update({str(number): known[number] for number in numbers})
        for of_others in ("groups", "num_parameters"):
            vars(self).pop(of_others, None)
        self._count()

    def _known(self) -> dict[int, nn.Module]:
        """All experts by number, here or elsewhere."""
        return self._elsewhere | {int(number): expert for number, expert in self._modules.items()}

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


def _empty(expert: nn.Module, device: torch.device) -> None:
    """Give an expert new parameters on a device, of any values."""
    for module in expert.modules():
        for name, old in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(old, device=device), old.requires_grad))
    if device.type != "meta":
        expert.to(device)  # its buffers
