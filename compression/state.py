"""Convert the state of a mixture to that of a mixture with fewer experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.experts import Experts
from model.moe_vit import AnyMoE

Build = Callable[..., AnyMoE]
"""Builds the model of a configuration, with random weights, on the CPU."""


def expert_names(model: AnyMoE) -> list[str]:
    """The names of the modules that contain one module per expert."""
    return [name for name, module in model.named_modules() if isinstance(module, Experts)]


def renumbered(name: str, lists: Sequence[str], before: Sequence[int]) -> str:
    """The old name of a tensor, where expert i was expert before[i]; lists: from `expert_names`."""
    for prefix in lists:
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            return f"{prefix}.{before[int(number)]}.{rest}"
    return name


def differing_axis(before: Tensor, after: Tensor) -> int | None:
    """The axis along which a tensor gets smaller with fewer experts; None if its shape does not change."""
    axes = [axis for axis, sizes in enumerate(zip(before.shape, after.shape, strict=True)) if sizes[0] != sizes[1]]
    return axes[0] if axes else None


def owner(model: AnyMoE, name: str) -> tuple[nn.Module, bool]:
    """The mixture that a tensor of several experts belongs to, and whether it is in the experts or in the gate."""
    modules = dict(model.named_modules())
    for mixture in model.mixtures:
        prefix = next(found for found, module in modules.items() if module is mixture)
        if name.startswith(f"{prefix}."):
            return mixture, name.startswith(f"{prefix}.experts.")
    raise AssertionError(f"{name} is in no mixture")  # every axis that depends on the number of experts is in one


def units(experts: nn.Module, kept: Sequence[int]) -> list[int]:
    """The positions of the hidden units of some experts, for a kind whose experts share tensors.

    Raises UserError for a kind, from a plug-in, that does not define them.
    """
    if not hasattr(experts, "units_of"):
        raise UserError(f"{type(experts).__name__} has no units_of(expert): its experts cannot be separated")
    return [unit for expert in kept for unit in experts.units_of(expert)]


def kept_state(model: AnyMoE, smaller: AnyMoE, kept: Sequence[int]) -> dict[str, Tensor]:
    """The state of `smaller`, which has only the experts `kept` of `model`, in this order."""
    state, lists, found = model.state_dict(), expert_names(model), {}
    for name, like in smaller.state_dict().items():
        value = state[renumbered(name, lists, kept)]
        axis = differing_axis(value, like)
        if axis is not None:
            mixture, inside = owner(model, name)
            size = value.shape[axis]
            entries = units(mixture.experts, kept) if inside else mixture.router.entries_of(kept, size)
            value = value.index_select(axis, torch.tensor(entries, device=value.device))
        found[name] = value.clone()
    return found
