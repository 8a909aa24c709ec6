"""Experts of the same shape computed together, on all rows or on their own rows, with counts on the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .experts import LayerStack
from .layers import ALIGNMENT, Alone, SideBySide, Sorted, joined, run


def has_kernel(x_BD: Tensor) -> bool:
    """Whether grouped products of these rows have a kernel that does not wait for the device (Hopper and later)."""
    return x_BD.dtype == torch.bfloat16 and x_BD.shape[1] % ALIGNMENT == 0 and kernel_on(x_BD.device)


def kernel_on(device: torch.device) -> bool:
    """Whether a device has a kernel for grouped products."""
    return hasattr(F, "grouped_mm") and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def fits(experts: Iterable[LayerStack]) -> bool:
    """Whether the kernel supports the width of every hidden layer; the outputs are padded."""
    return all(layer.in_features % ALIGNMENT == 0 for expert in experts for layer in expert.linears[1:])


def run_on_all(shapes: Sequence[Sequence[LayerStack]], x_BD: Tensor) -> Tensor:
    """Every expert on every row (B, D): outputs (E, B, C). shapes: the experts of each shape.

    All first layers are one product; after them experts of one shape are computed together.
    """
    first = [expert.linears[0] for experts in shapes for expert in experts]
    weight_HD, bias_H = (joined([getattr(layer, name) for layer in first], x_BD.dtype) for name in ("weight", "bias"))
    widths = [len(experts) * experts[0].linears[0].out_features for experts in shapes]
    hidden = F.linear(x_BD, weight_HD, bias_H).split(widths, dim=1)
    return torch.cat([_after_first(experts, h_BH) for experts, h_BH in zip(shapes, hidden, strict=True)])


def _after_first(experts: Sequence[LayerStack], h_BN: Tensor) -> Tensor:
    """The outputs (G, B, C) of G experts of one shape, from those of their first layers, concatenated (B, G * H)."""
    behind = list(zip(*experts, strict=True))[1:]
    if len(experts) == 1:
        return run(behind, h_BN.contiguous(), Alone())[None]
    return run(behind, h_BN.unflatten(1, (len(experts), -1)).transpose(0, 1), SideBySide())


def run_on_own(experts: Sequence[LayerStack], h_RD: Tensor, ends_G: Tensor, key_R: Tensor) -> Tensor:
    """G experts of one shape, each on its own rows, sorted by expert (R, D): outputs (R, C).

    ends_G: where each expert's rows end, int64, on the device. key_R: the expert of each row in [0, G).
    """
    layout = Sorted(ends_G.to(torch.int32), key_R, has_kernel(h_RD) and fits(experts))
    return run(zip(*experts, strict=True), h_RD, layout)
