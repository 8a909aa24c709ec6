"""From uint8 images to what a backbone takes: per-image flips and crops, resize, normalise, on the batch's device."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class AugmentConfig:
    """Augmentation: seeded views of the training images, drawn for each image on its own."""

    flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    crop: int = 3
    """Shift each image by up to so many of its own pixels either way, reflecting at the border; 0: off."""
    seed: int = 0
    """Seed of the views; the same seed gives the same view v of image n whatever the batch."""

    def __post_init__(self):
        if self.crop < 0:
            raise ValueError(f"augment.crop is {self.crop}: it is a number of pixels, 0 or more")

        if not 0 <= self.seed < 2**32:
            raise ValueError(f"augment.seed is {self.seed}: it must be at least 0 and below 2^32")

    @property
    def active(self) -> bool:
        """Whether views differ from the images at all."""
        return self.flip or self.crop > 0


@dataclass(frozen=True)
class View:
    """What one view does to each of N images. flip_N: bool; shift_N2: int64 pixels (rows, columns)."""

    flip_N: Tensor
    shift_N2: Tensor

    def __getitem__(self, indices_B: Tensor) -> "View":
        return View(self.flip_N[indices_B], self.shift_N2[indices_B])

    def to(self, device: torch.device) -> "View":
        """The same view on another device."""
        return View(*(None if part is None else part.to(device) for part in vars(self).values()))


def draw_view(num_images: int, config: AugmentConfig, index: int) -> View:
    """View number `index` of a split of `num_images` images; on the CPU, so that every device draws the same."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    flip_N = torch.rand(num_images, generator=generator) < 0.5
    shift_N2 = torch.randint(-config.crop, config.crop + 1, (num_images, 2), generator=generator)
    return View(flip_N & config.flip, shift_N2)


def apply_view(images_BCHW: Tensor, view: View) -> Tensor:
    """Flip and shift each image by its own row of `view`; any dtype and device, the shape stays."""
    _, channels, height, width = images_BCHW.shape
    device = images_BCHW.device
    flip_B, shift_B2 = view.flip_N.to(device), view.shift_N2.to(device)
    rows_BH = _reflect(torch.arange(height, device=device) + shift_B2[:, :1], height)
    columns_BW = _reflect(torch.arange(width, device=device) + shift_B2[:, 1:], width)
    columns_BW = torch.where(flip_B[:, None], columns_BW.flip(1), columns_BW)
    batch = torch.arange(len(images_BCHW), device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return images_BCHW[batch, channel, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) mirrored at the border pixel, which is not repeated; then kept inside."""
    positions = positions.abs()
    return ((size - 1) - ((size - 1) - positions).abs()).clamp_min(0)


def prepare(images_BCHW: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images as the backbone's float32 input (B, 3, size, size).

    Bicubic and antialiased, clamped to [0, 1] where bicubic overshoots, then normalised: the one path that
    training, evaluation and prediction share. Resizing is linear and separable, so it is two matrix
    products.
    """
    x_BCHW = images_BCHW.float() / 255
    height, width = x_BCHW.shape[-2:]
    device = x_BCHW.device
    shift_C11, scale_C11 = _normalisation(tuple(mean), tuple(std), device)
    if (height, width) != (size, size):
        rows_SH, columns_SW = _resize_matrix(height, size, device), _resize_matrix(width, size, device)
        with torch.autocast(device.type, enabled=False):
            x_BCHW = (rows_SH @ (x_BCHW @ columns_SW.T)).clamp_(0, 1)
    return torch.addcmul(shift_C11, x_BCHW, scale_C11)


@lru_cache(maxsize=64)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale) that normalise; kept on the device, as the matrices below, because a copy makes it wait."""
    scale_C11 = 1 / torch.tensor(std)[:, None, None]
    return (-torch.tensor(mean)[:, None, None] * scale_C11).to(device), scale_C11.to(device)


@lru_cache(maxsize=64)
def _resize_matrix(before: int, after: int, device: torch.device) -> Tensor:
    """The matrix (after, before) that resizes a column of pixels as F.interpolate does: its effect on unit vectors."""
    identity = torch.eye(before)[None, None]
    return F.interpolate(identity, (after, before), mode="bicubic", antialias=True)[0, 0].to(device)
