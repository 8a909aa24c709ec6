"""A frozen ViT in half precision, with its slow parts replaced by equivalent faster ones."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fast_copy(vit: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a timm ViT for inference in `dtype`, frozen and in evaluation mode; `vit` is not changed.

    Weights are cast once, while autocast casts them for every batch. QuickGELU, three passes over the widest tensor,
    becomes SiLU, one pass; the patch convolution becomes a matrix product. Unknown modules are not changed.
    """
    fast = copy.deepcopy(vit).requires_grad_(False).eval()
    for module in fast.modules():
        _fold_quick_gelu(module)
    _replace_patch_convolution(fast)
    return fast.to(dtype)


@torch.no_grad()
def _fold_quick_gelu(module: nn.Module) -> None:
    """x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702: scale the layer before it up, the layer after it down."""
    from timm.layers import Mlp
    from timm.layers.activations import QuickGELU

    if type(module) is not Mlp or not isinstance(module.act, QuickGELU):
        return
    if not (isinstance(module.norm, nn.Identity) and isinstance(module.fc1, nn.Linear)):
        return
    module.fc1.weight.mul_(1.702)
    if module.fc1.bias is not None:
        module.fc1.bias.mul_(1.702)
    module.fc2.weight.div_(1.702)
    module.act = nn.SiLU(inplace=True)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: images (B, 3, H, W) -> (B, D, H / P, W / P)."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.kernel_size = convolution.kernel_size
        self.weight = nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
        self.bias = None if convolution.bias is None else nn.Parameter(convolution.bias, requires_grad=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        batch, channels, height, width = images_BCHW.shape
        down, across = height // rows, width // columns
        cut = images_BCHW[:, :, : down * rows, : across * columns].reshape(batch, channels, down, rows, across, columns)
        patches_BPN = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * rows * columns)
        out_BPD = F.linear(patches_BPN, self.weight, self.bias)
        return out_BPD.transpose(1, 2).unflatten(2, (down, across))


def _replace_patch_convolution(vit: Any) -> None:
    convolution = getattr(getattr(vit, "patch_embed", None), "proj", None)
    if type(convolution) is not nn.Conv2d or convolution.groups != 1 or convolution.stride != convolution.kernel_size:
        return
    if convolution.padding == (0, 0) and convolution.dilation == (1, 1):
        vit.patch_embed.proj = PatchProjection(convolution)
