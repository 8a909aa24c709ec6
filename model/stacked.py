"""Parameters of one shape that are trained as one tensor.

Each parameter costs the host some time in a step: to cast it, to receive its gradient, to clip and to update it. With
many experts this can take longer than the work of a GPU. A stack needs this time only once for all experts of one
shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Stack:
    """Parameters (N_i, ...) of one dtype as one, `whole` (sum of N_i, ...); they become views of it.

    Train `whole` instead of `parts`, and call `collect` after a backward pass. A forward pass may use `whole_of` all
    parts, or single ones.
    """

    def __init__(self, parts: Sequence[nn.Parameter]):
        self.parts: list[Any] = list(parts)
        self.rows = [len(part) for part in parts]
        self.whole = nn.Parameter(torch.cat([part.detach() for part in parts]))
        for part, view in zip(self.parts, self.whole.detach().split(self.rows), strict=True):
            part.data = view
            part.grad = None
            part.whole = self.whole  # no reference back, so that all are freed together; copies lack it

    def collect(self) -> None:
        """Move the gradients of single parts into that of the whole."""
        if all(part.grad is None for part in self.parts):
            return
        grad = torch.cat([torch.zeros_like(part) if part.grad is None else part.grad for part in self.parts])
        self.whole.grad = grad if self.whole.grad is None else self.whole.grad + grad
        for part in self.parts:
            part.grad = None

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The views of a tensor like the whole that belong to the parts."""
        return tensor.split(self.rows)


def release(part: Any) -> None:
    """Give a parameter that is no longer part of a stack its own memory, so that the stack's can be freed."""
    if hasattr(part, "whole"):
        part.data = part.detach().clone()
        del part.whole


def whole_of(parts: list[Any]) -> nn.Parameter | None:
    """The parameter that consists of exactly these parts, in this order (None: there is none)."""
    if torch.compiler.is_compiling():
        return None
    whole = getattr(parts[0], "whole", None)
    if whole is None or any(getattr(part, "whole", None) is not whole for part in parts):
        return None
    return whole if len(whole) == sum(len(part) for part in parts) else None
