"""A model that starts from another one's weights: what is taken, class rows by name, and what of it stays frozen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .norm import Standardise
from .parts import class_rows, part_of


@dataclass(frozen=True)
class Shared:
    """The classes that two models have in common: the row of each in the new and in the old one."""

    new: Tensor
    old: Tensor

    @classmethod
    def by_name(cls, now: Sequence[str], before: Sequence[str]) -> "Shared":
        """The classes of equal name, whatever their order."""
        places = {name: row for row, name in enumerate(before)}
        pairs = [(row, places[name]) for row, name in enumerate(now) if name in places]
        rows = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return cls(rows[:, 0], rows[:, 1])


@torch.no_grad()
def take(model: nn.Module, weights: dict[str, Tensor], shared: Shared) -> None:
    """Put another model's state into `model`: everything, of the class rows those of the classes in common.

    New class rows, and experts and gate columns that only `model` has, stay as they are; usage counters too, which
    count the samples of one run. Raises ValueError where the models do not fit each other.
    """
    rows, state = class_rows(model), model.state_dict()
    if lost := [name for name in weights if name not in state]:
        raise ValueError(f"it has {lost[0]}, which this model does not have")
    for name, value in state.items():
        if part_of(name, rows) is None or is_new(model, name):
            continue
        if name not in weights:
            raise ValueError(f"it lacks {name}, which this model has")
        before = weights[name]
        if name in rows and before.shape[1:] == value.shape[1:]:
            value[shared.new.to(value.device)] = before[shared.old].to(value)
        elif before.shape == value.shape:
            value.copy_(before)
        else:
            raise ValueError(f"its {name} has the shape {tuple(before.shape)}, this model's {tuple(value.shape)}")


def is_new(model: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer belongs to experts, or their gate columns, that were added in this run."""
    return False


class Frozen:
    """The parts of a model that stay as they were taken: weights, statistics and biases, bit for bit.

    parts: of PARTS. shared: the classes in common, whose rows alone are frozen with the head. Whole parameters need no
    gradient any more; of those with new rows, and of buffers, the taken values are put back after each step. What is
    normalised by statistics uses the running ones. Noise and dropout are as in any training. Raises ValueError where
    nothing is left to train, or the head is frozen and no class is in common.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], shared: Shared, num_classes: int):
        if "head" in parts and not len(shared.new):
            raise ValueError("freeze head needs a class in common with the run that init names, and there is none")
        rows = class_rows(model)
        self.norms: list[nn.Module] = []
        self.rows: list[tuple[nn.Parameter, Tensor]] = []
        self.held: list[Tensor] = []
        whole = len(shared.new) == num_classes

        def held(name: str) -> bool:
            return part_of(name, rows) in parts and not is_new(model, name)

        for name, parameter in model.named_parameters():
            if held(name) and (name not in rows or whole):
                parameter.requires_grad_(False)
            elif held(name):
                kept = torch.zeros(num_classes, dtype=torch.bool)
                kept[shared.new] = True
                self.rows.append((parameter, kept.to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))))
        self.held = [buffer for name, buffer in model.named_buffers() if held(name)]
        for name, module in model.named_modules():
            if isinstance(module, Standardise) and held(f"{name}.weight"):
                self.norms.append(module)
        if parts and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"freeze {','.join(parts)} leaves nothing to train: leave out a part, such as head")
        self.remember()

    def remember(self) -> None:
        """Take the values of now as those to keep: at the beginning, and once a checkpoint has been loaded."""
        self._rows = [parameter.detach().clone() for parameter, _ in self.rows]
        self._held = [buffer.clone() for buffer in self.held]

    def hold(self) -> None:
        """To be called after `model.train()`: normalise by the running statistics."""
        for module in self.norms:
            module.eval()

    @torch.no_grad()
    def before_step(self) -> None:
        """Leave frozen rows out of the gradient, and of its norm."""
        for parameter, kept in self.rows:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(kept, 0.0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put back what weight decay, statistics and biases have moved."""
        for (parameter, kept), taken in zip(self.rows, self._rows, strict=True):
            parameter.copy_(torch.where(kept, taken, parameter))
        for buffer, taken in zip(self.held, self._held, strict=True):
            buffer.copy_(taken)
