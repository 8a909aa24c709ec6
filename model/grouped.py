"""Experts of one shape as one: each on all rows, or on rows whose counts stay on the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import Expert

ALIGNMENT = 8  # numbers: rows of the grouped kernel's operands begin at multiples of 16 bytes


def has_kernel(x_BD: Tensor) -> bool:
    """Whether grouped products of such rows have a kernel that does not wait for the device (Hopper and later)."""
    if not hasattr(F, "grouped_mm") or x_BD.dtype != torch.bfloat16 or x_BD.shape[1] % ALIGNMENT:
        return False
    return x_BD.is_cuda and torch.cuda.get_device_capability(x_BD.device)[0] >= 9


def fits(experts: Iterable[Expert]) -> bool:
    """Whether every hidden layer is as wide as the kernel wants it; the classes are padded."""
    return all(width % ALIGNMENT == 0 for expert in experts for width in expert.widths[:-1])


def after_first(experts: list[Expert], h_BN: Tensor) -> Tensor:
    """What G experts of one shape make of the outputs of their first layers, side by side (B, G * H): (G, B, C)."""
    if len(experts) == 1:
        return experts[0].after_first(h_BN.contiguous())[None]
    h_GBH = h_BN.unflatten(1, (len(experts), -1)).transpose(0, 1)
    for layers in list(zip(*experts, strict=True))[1:]:
        if isinstance(layers[0], nn.Linear):
            weight_GNH, bias_G1N = _stack(layers, "weight", h_GBH), _stack(layers, "bias", h_GBH)[:, None]
            h_GBH = torch.baddbmm(bias_G1N, h_GBH, weight_GNH.transpose(1, 2))
        elif isinstance(layers[0], nn.LayerNorm):
            h_GBH = F.layer_norm(h_GBH, h_GBH.shape[2:], eps=layers[0].eps)
            weight_G1H, bias_G1H = (_stack(layers, name, h_GBH)[:, None] for name in ("weight", "bias"))
            h_GBH = torch.addcmul(bias_G1H, h_GBH, weight_G1H)
        else:
            h_GBH = layers[0](h_GBH)  # ReLU and Dropout are alike in all of them
    return h_GBH


class GroupedExperts:
    """G experts of one shape: rows sorted by expert (R, D) -> outputs (R, C).

    Called with ends_G, where each expert's rows end (int64, on the device), and key_R, the expert of each row in
    [0, G). What comes out of rows behind the last end may be any number, as may their gradients: not to be read.
    """

    def __init__(self, experts: list[Expert]):
        self.experts = experts

    def __call__(self, h_RD: Tensor, ends_G: Tensor, key_R: Tensor) -> Tensor:
        kernel = has_kernel(h_RD) and fits(self.experts)
        ends_G = ends_G.to(torch.int32)
        for layers in zip(*self.experts, strict=True):
            if isinstance(layers[0], nn.Linear):
                h_RD = self._linear(layers, h_RD, ends_G, kernel)
                h_RD = h_RD + _rows(_stack(layers, "bias", h_RD), key_R, ends_G, kernel)
            elif isinstance(layers[0], nn.LayerNorm):
                h_RD = F.layer_norm(h_RD, h_RD.shape[1:], eps=layers[0].eps)
                weight_RD, bias_RD = (
                    _rows(_stack(layers, name, h_RD), key_R, ends_G, kernel) for name in ("weight", "bias")
                )
                h_RD = torch.addcmul(bias_RD, h_RD, weight_RD)
            else:
                h_RD = layers[0](h_RD)  # ReLU and Dropout are alike in all of them
        return h_RD

    @staticmethod
    def _linear(layers, h_RD: Tensor, ends_G: Tensor, kernel: bool) -> Tensor:
        weight_GND = _stack(layers, "weight", h_RD)
        if not kernel:
            return _one_by_one(h_RD, weight_GND, ends_G)
        out_RN = F.grouped_mm(h_RD, _aligned(weight_GND).transpose(1, 2), offs=ends_G)
        return out_RN[:, : weight_GND.shape[1]]


def _stack(layers, name: str, like: Tensor) -> Tensor:
    tensors = [getattr(layer, name) for layer in layers]
    return joined(tensors, like.dtype).unflatten(0, (len(tensors), -1))


def joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors (N_i, ...) one after the other in `dtype`, (sum of N_i, ...); one pass over them all, and one back."""
    return _Joined.apply(dtype, *tensors)


class _Joined(torch.autograd.Function):
    """Casting and copying at once: a kernel or two for any number of weights, and half the traffic of cast and cat."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.rows, ctx.dtype = [len(tensor) for tensor in tensors], tensors[0].dtype
        out = tensors[0].new_empty((sum(ctx.rows), *tensors[0].shape[1:]), dtype=dtype)
        torch._foreach_copy_(list(out.split(ctx.rows)), list(tensors))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts = list(grad.split(ctx.rows))
        found = [torch.empty(part.shape, dtype=ctx.dtype, device=part.device) for part in parts]
        torch._foreach_copy_(found, parts)
        return None, *found


def _one_by_one(h_RD: Tensor, weight_GND: Tensor, ends_G: Tensor) -> Tensor:
    """The grouped product where there is no kernel for it: waits for the device."""
    ends = ends_G.tolist()
    parts = [h_RD[a:b] @ weight_ND.T for a, b, weight_ND in zip([0, *ends], ends, weight_GND, strict=False)]
    rest = h_RD.new_zeros(len(h_RD) - ends[-1], weight_GND.shape[1])
    return torch.cat([*parts, rest])


def _rows(table_GN: Tensor, key_R: Tensor, ends_G: Tensor, kernel: bool) -> Tensor:
    """table_GN[key_R], whose gradient is summed by a grouped product where there is one: rows come in order."""
    if not kernel:
        return table_GN.index_select(0, key_R)
    return _SortedRows.apply(_aligned(table_GN), key_R, ends_G)[:, : table_GN.shape[1]]


def _aligned(tensor: Tensor) -> Tensor:
    """(G, N) or (G, N, D) with zeros behind the N, up to a multiple of ALIGNMENT."""
    lacking = -tensor.shape[1] % ALIGNMENT  # to pad by nothing would copy
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, lacking)) if lacking else tensor


class _SortedRows(torch.autograd.Function):
    """Look up rows by sorted keys; the gradient is a product: atomic additions would contend for so few rows."""

    @staticmethod
    def forward(ctx, table_GN: Tensor, key_R: Tensor, ends_G: Tensor) -> Tensor:
        ctx.save_for_backward(ends_G)
        return table_GN.index_select(0, key_R)

    @staticmethod
    def backward(ctx, grad_RN: Tensor):
        (ends_G,) = ctx.saved_tensors
        ones_RA = grad_RN.new_ones(len(grad_RN), ALIGNMENT)
        sums_GAN = F.grouped_mm(ones_RA.T, grad_RN.contiguous(), offs=ends_G)
        return sums_GAN[:, 0], None, None
