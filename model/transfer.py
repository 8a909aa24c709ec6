"""Start a model from another model's weights: copy them, match class rows by name, and freeze parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .moe_vit import AnyMoE
from .norm import Standardise
from .parts import class_rows, part_of


@dataclass(frozen=True)
class Shared:
    """The classes that two models share: the row of each in the new and in the old model."""

    new: Tensor
    old: Tensor

    @classmethod
    def by_name(cls, now: Sequence[str], before: Sequence[str]) -> "Shared":
        """The classes with equal names, in any order."""
        places = {name: row for row, name in enumerate(before)}
        pairs = [(row, places[name]) for row, name in enumerate(now) if name in places]
        rows = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return cls(rows[:, 0], rows[:, 1])


@torch.no_grad()
def take(model: AnyMoE, weights: dict[str, Tensor], shared: Shared) -> None:
    """Copy another model's state into `model`: everything, but only the rows of classes that both have.

    New class rows keep their values, and so do usage counters, which count the samples of one run. New experts after
    the old ones start with gates that never choose them. Raises ValueError if the models do not fit each other.
    """
    rows, state = class_rows(model), model.state_dict()
    if lost := [name for name in weights if name not in state]:
        raise ValueError(f"it has {lost[0]}, which this model does not have")
    for name, value in state.items():
        new = new_entries(model, name, value)
        if part_of(name, rows) is None or (new is not None and bool(new.all())):
            continue
        if name not in weights:
            if name.endswith("margin_E"):  # 0, as for experts that were never added
                continue
            raise ValueError(f"it lacks {name}, which this model has")
        before, old = weights[name], value if new is None else _without(value, new)
        if name in rows and before.shape[1:] == value.shape[1:]:
            value[shared.new.to(value.device)] = before[shared.old].to(value)
        elif before.shape == old.shape:
            old.copy_(before)
        else:
            raise ValueError(f"its {name} has the shape {tuple(before.shape)}, this model's {tuple(old.shape)}")
    if model.first_new is not None:
        mixtures: Any = model.mixtures
        for mixture in mixtures:
            expert_E = torch.arange(mixture.router.num_experts, device=next(model.parameters()).device)
            mixture.router.close_to(expert_E[model.first_new :], expert_E[: model.first_new])


def new_entries(model: AnyMoE, name: str, value: Tensor) -> Tensor | None:
    """The entries of a parameter or buffer that belong to experts added in this run, or to their gate columns.

    bool, of a shape that broadcasts with it; they are the last entries along an axis. None: there are none.
    """
    first, words = model.first_new, name.split(".")
    if first is None:
        return None
    if "router" in words:
        of_gate = words[-2] in ("gate", "noise") or (words[-2] == "router" and words[-1].endswith("_E"))
        return _last(value, 0, first) if of_gate else None
    if "experts" not in words:
        return None
    index = next((int(word) for word in words[words.index("experts") :] if word.isdigit()), None)
    if index is not None:  # each expert is a separate module
        return _last(value, 0, 0 if index >= first else len(value)) if value.ndim else None
    mixture: Any = model.mixtures[int(words[1])] if words[0] == "mixtures" else model.mixtures[0]
    units = sum(len(mixture.experts.units_of(expert)) for expert in range(first))
    return _last(value, 1 if words[-1] == "up" else 0, units)


def _last(value: Tensor, axis: int, first: int) -> Tensor | None:
    """True from `first` on along an axis; None if all entries are False."""
    size = value.shape[axis]
    shape = [1] * value.ndim
    shape[axis] = size
    return (torch.arange(size, device=value.device) >= first).view(shape) if first < size else None


def _without(value: Tensor, new: Tensor) -> Tensor:
    """The entries of `value` before the new ones, as a view."""
    axis = max(range(new.ndim), key=lambda axis: new.shape[axis])
    return value.narrow(axis, 0, int((~new).sum()))


class Frozen:
    """The frozen parts of a model: copied weights, statistics and biases stay the same bit for bit.

    parts: of PARTS. shared: the classes that both models have; with the head, only their rows are frozen. Parameters
    that are frozen completely need no gradient; for parameters that also contain new classes or experts, and for
    buffers, the copied values are restored after each step. Normalisation uses the running statistics. Noise and
    dropout stay active. Raises ValueError if nothing is left to train, or if the head is frozen and no class is shared.
    """

    def __init__(self, model: AnyMoE, parts: Sequence[str], shared: Shared, num_classes: int):
        if "head" in parts and not len(shared.new):
            raise ValueError("freeze head needs a class that the run of init has too, but there is none")
        rows, whole = class_rows(model), len(shared.new) == num_classes
        self.norms: list[nn.Module] = []
        self.partly: list[tuple[nn.Parameter, Tensor]] = []  # and which of its entries are frozen
        self.buffers: list[tuple[Tensor, Tensor | None]] = []
        self.count = 0  # number of frozen weights

        def frozen(name: str) -> bool:
            return part_of(name, rows) in parts

        for name, parameter in model.named_parameters():
            if not frozen(name):
                continue
            new = new_entries(model, name, parameter)
            kept = torch.ones_like(parameter, dtype=torch.bool) if new is None else ~new.expand_as(parameter)
            if name in rows and not whole:
                kept = kept & _chosen(shared.new, parameter)
            self.count += int(kept.sum())
            if kept.all():
                parameter.requires_grad_(False)
            elif kept.any():
                self.partly.append((parameter, kept))
        stored = model.state_dict().keys()  # the others follow from the configuration
        for name, buffer in model.named_buffers():
            if name in stored and frozen(name):
                new = new_entries(model, name, buffer)
                self.buffers.append((buffer, None if new is None else ~new.expand_as(buffer)))
        for name, module in model.named_modules():
            if isinstance(module, Standardise) and frozen(f"{name}.weight"):
                self.norms.append(module)
        if parts and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"freeze {','.join(parts)} leaves nothing to train: leave out a part, such as head")
        self.remember()

    def remember(self) -> None:
        """Store the current values as those to keep: at the start, and after loading a checkpoint."""
        self._partly = [parameter.detach().clone() for parameter, _ in self.partly]
        self._buffers = [buffer.clone() for buffer, _ in self.buffers]

    def hold(self) -> None:
        """Call after `model.train()`: normalise with the running statistics."""
        for module in self.norms:
            module.eval()

    @torch.no_grad()
    def before_step(self) -> None:
        """Exclude frozen entries from the gradient and its norm."""
        for parameter, kept in self.partly:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(kept, 0.0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore frozen values that weight decay, statistics and bias updates have changed."""
        for (parameter, kept), taken in zip(self.partly, self._partly, strict=True):
            parameter.copy_(torch.where(kept, taken, parameter))
        for (buffer, kept), taken in zip(self.buffers, self._buffers, strict=True):
            buffer.copy_(taken if kept is None else torch.where(kept, taken, buffer))


def _chosen(rows: Tensor, value: Tensor) -> Tensor:
    """True in these rows of a tensor, bool in its shape."""
    kept = torch.zeros_like(value, dtype=torch.bool)
    kept[rows.to(value.device)] = True
    return kept
