"""The layers of experts, computed for one expert, for several on all rows, and for rows sorted by expert.

An expert of `nn.Linear`, `nn.LayerNorm` and layers without parameters, the first of them linear, can be computed
together with others of its shape.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stacked import whole_of

ALIGNMENT = 8  # elements: rows of the grouped kernel's operands start at multiples of 16 bytes


class Layout(Protocol):
    """The layout of the rows of G experts of one shape in a tensor, and the layers on it."""

    def linear(self, layers: Sequence[nn.Linear], h: Tensor, /) -> Tensor:
        """Each expert's linear layer on its rows."""
        ...

    def norm(self, layers: Sequence[nn.LayerNorm], h: Tensor, /) -> Tensor:
        """Each expert's LayerNorm of its rows."""
        ...


def run(layers: Iterable[Sequence[Any]], h: Tensor, layout: Layout) -> Tensor:
    """Run experts of one shape on their rows. layers: at each depth the layer of each expert.

    Computes in the dtype of `h`, to which weights are cast: autocast would normalise in float32 and move twice the
    bytes.
    """
    with torch.autocast(h.device.type, enabled=False):
        for same in layers:
            if isinstance(same[0], nn.Linear):
                h = layout.linear(same, h)
            elif isinstance(same[0], nn.LayerNorm):
                h = layout.norm(same, h)
            else:  # a layer without parameters, equal in all experts
                h = same[0](h)
    return h


class Alone:
    """One expert: (B, D)."""

    @staticmethod
    def linear(layers: Sequence[nn.Linear], h_BD: Tensor) -> Tensor:
        return F.linear(h_BD, *_cast(layers[0], h_BD.dtype))

    @staticmethod
    def norm(layers: Sequence[nn.LayerNorm], h_BD: Tensor) -> Tensor:
        return F.layer_norm(h_BD, layers[0].normalized_shape, *_cast(layers[0], h_BD.dtype), layers[0].eps)


class SideBySide:
    """G experts, each on all B rows: (G, B, D)."""

    @staticmethod
    def linear(layers: Sequence[nn.Linear], h_GBD: Tensor) -> Tensor:
        weight_GHD, bias_G1H = stack(layers, "weight", h_GBD), stack(layers, "bias", h_GBD)[:, None]
        return torch.baddbmm(bias_G1H, h_GBD, weight_GHD.transpose(1, 2))

    @staticmethod
    def norm(layers: Sequence[nn.LayerNorm], h_GBD: Tensor) -> Tensor:
        h_GBD = F.layer_norm(h_GBD, h_GBD.shape[2:], eps=layers[0].eps)
        weight_G1D, bias_G1D = (stack(layers, name, h_GBD)[:, None] for name in ("weight", "bias"))
        return torch.addcmul(bias_G1D, h_GBD, weight_G1D)


class Sorted:
    """G experts, each on its own rows, sorted by expert: (R, D).

    ends_G: end of each expert's rows, int32, on the device. key_R: the expert of each row in [0, G). kernel: whether
    there is a kernel for grouped products; without it they wait for the device. Outputs and gradients of rows after the
    last end are undefined.
    """

    def __init__(self, ends_G: Tensor, key_R: Tensor, kernel: bool):
        self.ends_G, self.key_R, self.kernel = ends_G, key_R, kernel

    def linear(self, layers: Sequence[nn.Linear], h_RD: Tensor) -> Tensor:
        return self._product(h_RD, stack(layers, "weight", h_RD)) + self._rows(layers, "bias", h_RD)

    def norm(self, layers: Sequence[nn.LayerNorm], h_RD: Tensor) -> Tensor:
        h_RD = F.layer_norm(h_RD, h_RD.shape[1:], eps=layers[0].eps)
        weight_RD, bias_RD = (self._rows(layers, name, h_RD) for name in ("weight", "bias"))
        return torch.addcmul(bias_RD, h_RD, weight_RD)

    def _product(self, h_RD: Tensor, weight_GHD: Tensor) -> Tensor:
        if self.kernel:
            out_RH = F.grouped_mm(h_RD, _aligned(weight_GHD).transpose(1, 2), offs=self.ends_G)
            return out_RH[:, : weight_GHD.shape[1]]
        ends = self.ends_G.tolist()
        parts = [h_RD[a:b] @ weight_HD.T for a, b, weight_HD in zip([0, *ends], ends, weight_GHD, strict=False)]
        return torch.cat([*parts, h_RD.new_zeros(len(h_RD) - ends[-1], weight_GHD.shape[1])])

    def _rows(self, layers: Sequence[nn.Module], name: str, like: Tensor) -> Tensor:
        """A parameter of each row's expert, (R, N); the gradient is a grouped product if there is a kernel."""
        table_GN = stack(layers, name, like)
        if not self.kernel:
            return table_GN.index_select(0, self.key_R)
        return _SortedRows.apply(_aligned(table_GN), self.key_R, self.ends_G)[:, : table_GN.shape[1]]


def stack(layers: Sequence[nn.Module], name: str, like: Tensor) -> Tensor:
    """A parameter of G layers of one shape as one tensor (G, ...) in the dtype of `like`."""
    tensors = [getattr(layer, name) for layer in layers]
    if (whole := whole_of(tensors)) is not None:
        return whole.to(like.dtype).unflatten(0, (len(tensors), -1))
    return joined(tensors, like.dtype).unflatten(0, (len(tensors), -1))


def joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate tensors (N_i, ...) in `dtype`, (sum of N_i, ...), in one pass forward and one backward."""
    return _Joined.apply(dtype, *tensors)


def _cast(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias in `dtype`, differentiable."""
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _aligned(tensor: Tensor) -> Tensor:
    """(G, N) or (G, N, D) with N padded with zeros to a multiple of ALIGNMENT."""
    lacking = -tensor.shape[1] % ALIGNMENT  # padding by 0 would copy
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, lacking)) if lacking else tensor


class _Joined(torch.autograd.Function):
    """Cast and concatenate at once: one or two kernels for any number of weights, and half the memory traffic."""

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


class _SortedRows(torch.autograd.Function):
    """Look up rows by sorted keys; the gradient is a product, because atomic additions to few rows are slow."""

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
