"""Augmentation of uint8 images: per-image flips, crops and colours, on the images' device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WIDEST = 10_000  # largest shift in pixels
ASPECT = 1.2  # largest aspect ratio of a random resized crop


@dataclass
class AugmentConfig:
    """Augmentation: seeded views of the training images, drawn independently for each image."""

    flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    crop: int = 3
    """Largest shift of an image in pixels, horizontally and vertically, with reflected borders; 0: off."""
    scale: float = 1.0
    """Random resized crop (Szegedy 2015): smallest crop as a fraction of the image's area; 1: off."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation; 0: off."""
    strong: float = 0.5
    """Fraction of the images of a view that `scale` and `color_jitter` change; the others get only flip and crop."""
    seed: int = 0
    """Seed of the views; view v of image n depends only on this seed, not on the batch."""

    def __post_init__(self):
        if not 0 <= self.crop <= WIDEST:
            raise ValueError(f"augment.crop is {self.crop}: it must be a number of pixels from 0 to {WIDEST:,}")
        if not 0.05 <= self.scale <= 1:
            raise ValueError(
                f"augment.scale is {self.scale}: it must be a fraction of the image's area from 0.05 to 1 (1: off)"
            )
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"augment.color_jitter is {self.color_jitter}: it must be at least 0 and below 1")
        if not 0 <= self.strong <= 1:
            raise ValueError(f"augment.strong is {self.strong}: it must be a fraction of the images from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"augment.seed is {self.seed}: it must be at least 0 and below 2^32")

    @property
    def active(self) -> bool:
        """Whether views differ from the original images."""
        return self.flip or self.crop > 0 or self.has_strong

    @property
    def has_strong(self) -> bool:
        """Whether some images get more than flip and crop."""
        return self.strong > 0 and (self.scale < 1 or self.color_jitter > 0)


@dataclass(frozen=True)
class View:
    """The augmentation of N images in one view.

    flip_N: bool. shift_N2: int64 pixels (rows, columns). box_N4: float32, the crop that is resized to the whole image:
    centre (x, y) in [-1, 1], width and height as fractions. color_N3: float32 factors of brightness, contrast and
    saturation. strong_N: bool, the images that crop and colour change. The last three are None if no image has them.
    """

    flip_N: Tensor
    shift_N2: Tensor
    box_N4: Tensor | None = None
    color_N3: Tensor | None = None
    strong_N: Tensor | None = None

    def __getitem__(self, indices_B: Tensor) -> "View":
        return View(*(None if part is None else part[indices_B] for part in vars(self).values()))

    def to(self, device: torch.device) -> "View":
        """The same view on another device."""
        return View(*(None if part is None else part.to(device) for part in vars(self).values()))


def draw_view(num_images: int, config: AugmentConfig, index: int) -> View:
    """View number `index` of a split of `num_images` images; on the CPU, so that all devices get the same."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    flip_N = torch.rand(num_images, generator=generator) < 0.5
    shift_N2 = torch.randint(-config.crop, config.crop + 1, (num_images, 2), generator=generator)
    if not config.has_strong:
        return View(flip_N & config.flip, shift_N2)
    uniform_N8 = torch.rand(num_images, 8, generator=generator)
    area_N = config.scale + (1 - config.scale) * uniform_N8[:, 0]
    aspect_N = torch.exp(math.log(ASPECT) * (2 * uniform_N8[:, 1] - 1))
    sides_N2 = torch.stack([area_N * aspect_N, area_N / aspect_N], dim=1).sqrt().clamp_max(1)
    centre_N2 = (2 * uniform_N8[:, 2:4] - 1) * (1 - sides_N2)
    color_N3 = 1 + config.color_jitter * (2 * uniform_N8[:, 4:7] - 1)
    strong_N = uniform_N8[:, 7] < config.strong
    return View(flip_N & config.flip, shift_N2, torch.cat([centre_N2, sides_N2], dim=1), color_N3, strong_N)


def apply_view(images_BCHW: Tensor, view: View) -> Tensor:
    """Augment each uint8 image (B, 3, H, W) by its row of `view`, on the images' device; the shape stays."""
    _, channels, height, width = images_BCHW.shape
    device = images_BCHW.device
    flip_B, shift_B2 = view.flip_N.to(device), view.shift_N2.to(device)
    rows_BH = _reflect(torch.arange(height, device=device) + shift_B2[:, :1], height)
    columns_BW = _reflect(torch.arange(width, device=device) + shift_B2[:, 1:], width)
    columns_BW = torch.where(flip_B[:, None], columns_BW.flip(1), columns_BW)
    batch = torch.arange(len(images_BCHW), device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    moved_BCHW = images_BCHW[batch, channel, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]
    if view.box_N4 is None:
        return moved_BCHW
    strong_BCHW = _recolor(_enlarge(moved_BCHW.float() / 255, view.box_N4.to(device)), view.color_N3.to(device))
    strong_BCHW = (strong_BCHW * 255).round().to(images_BCHW.dtype)
    return torch.where(view.strong_N.to(device)[:, None, None, None], strong_BCHW, moved_BCHW)


def _enlarge(x_BCHW: Tensor, box_B4: Tensor) -> Tensor:
    """Resize each image's crop to the size of the image (bicubic)."""
    theta_B23 = x_BCHW.new_zeros(len(x_BCHW), 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = box_B4[:, 2], box_B4[:, 3]
    theta_B23[:, :, 2] = box_B4[:, :2]
    grid_BHW2 = F.affine_grid(theta_B23, list(x_BCHW.shape), align_corners=False)
    enlarged = F.grid_sample(x_BCHW, grid_BHW2, mode="bicubic", padding_mode="reflection", align_corners=False)
    return enlarged.clamp(0, 1)


def _recolor(x_BCHW: Tensor, color_B3: Tensor) -> Tensor:
    """Scale brightness, contrast (around the image's mean) and saturation (around grey), in that order."""
    brightness_B111, contrast_B111, saturation_B111 = color_B3[:, :, None, None, None].unbind(dim=1)
    x_BCHW = x_BCHW * brightness_B111
    mean_B111 = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    x_BCHW = mean_B111 + contrast_B111 * (x_BCHW - mean_B111)
    grey_B1HW = x_BCHW.mean(dim=1, keepdim=True)
    return (grey_B1HW + saturation_B111 * (x_BCHW - grey_B1HW)).clamp(0, 1)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Reflect positions outside [0, size) at the border pixel, without repeating it; then clamp."""
    positions = positions.abs()
    return ((size - 1) - ((size - 1) - positions).abs()).clamp_min(0)
