"""From uint8 images to the input of a ViT: resize and normalise, on the images' device."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Preparation = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


def prepare(images_BCHW: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images as the backbone's float32 input (B, 3, size, size).

    Bicubic and antialiased, clamped to [0, 1], then normalised; used by training, evaluation and prediction.
    """
    sides = (*images_BCHW.shape[-2:], size)
    return resize_and_normalise(images_BCHW, preparation(sides, tuple(mean), tuple(std), images_BCHW.device))


def resize_and_normalise(images_BCHW: Tensor, preparation: Preparation) -> Tensor:
    """The arithmetic of `prepare`: uint8 (B, 3, H, W) -> float32 (B, 3, S, S).

    Resizing is linear and separable: two matrix products.
    """
    rows_SH, columns_SW, shift_C11, scale_C11 = preparation
    x_BCHW = images_BCHW.float() / 255
    if rows_SH is not None and columns_SW is not None:
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x_BCHW = (rows_SH @ (x_BCHW @ columns_SW.T)).clamp_(0, 1)
    return torch.addcmul(shift_C11, x_BCHW, scale_C11)


@lru_cache(maxsize=64)
def preparation(
    sides: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Preparation:
    """The constants that resize images from (H, W) to side S and normalise them. sides: H, W, S.

    Returns rows (S, H) and columns (S, W), None if the size stays, and shift and scale (3, 1, 1). Cached on the device,
    because a copy would wait.
    """
    height, width, size = sides
    scale_C11 = 1 / torch.tensor(std)[:, None, None]
    shift_C11 = -torch.tensor(mean)[:, None, None] * scale_C11
    resizes = (height, width) != (size, size)
    rows_SH, columns_SW = (_resize_matrix(side, size).to(device) if resizes else None for side in (height, width))
    return rows_SH, columns_SW, shift_C11.to(device), scale_C11.to(device)


def _resize_matrix(before: int, after: int) -> Tensor:
    """The matrix (after, before) that resizes a column of pixels as F.interpolate does."""
    identity = torch.eye(before)[None, None]
    return F.interpolate(identity, (after, before), mode="bicubic", antialias=True)[0, 0]
