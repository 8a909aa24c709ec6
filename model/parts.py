"""The parts of a model by name, and which of its parameters have a row for each class."""

from torch import nn

from .experts import LayerStack
from .moe import MixtureOfExperts

PARTS = ("neck", "router", "experts", "shared", "head")
"""The parts that can be frozen or have a separate learning rate. head: the class rows, in whichever layer they are."""


def part_of(name: str, class_rows: set[str]) -> str | None:
    """The part that a parameter or buffer belongs to by its name in the state dict; None for usage counters."""
    words = name.split(".")
    if name in class_rows or words[0] == "head":
        return "head"
    for part in ("router", "shared", "experts"):
        if part in words:
            return part
    return "neck" if words[0] == "neck" else None


def class_rows(model: nn.Module) -> set[str]:
    """The names of the parameters whose first dimension counts the classes.

    Behind the ViT these are the last layers of all experts, and the linear head that replaces dropped choices.
    """
    found = {name for name, _ in model.named_parameters() if name in ("head.weight", "head.bias")}
    for prefix, module in model.named_modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        lists = {"experts": module.experts, "shared": module.shared}
        for where, experts in lists.items():
            for number, expert in experts.named_children():  # by their names in the state
                if isinstance(expert, LayerStack):
                    last = max(index for index, layer in enumerate(expert) if isinstance(layer, nn.Linear))
                    found |= {f"{prefix}.{where}.{number}.{last}.{name}" for name in ("weight", "bias")}
        if module.skip is not None:
            found |= {f"{prefix}.skip.{name}" for name in ("weight", "bias")}
    return found
