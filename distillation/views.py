"""Random views of 32x32 images, drawn per image and computed for a whole batch at once on its device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROTATION_STD = math.radians(8)


def random_views(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image: crop or zoom out, flip, rotation, colour, then mixup or CutMix for half.

    images_BCHW: uint8, 3 channels, in random order, because an image is mixed with its neighbour in the batch.
    generator: on the images' device. Returns uint8 of the same shape: teacher and student must see exactly the same
    pixels ("a patient and consistent teacher", Beyer 2022), so this function does the rounding.
    """
    x_BCHW = images_BCHW.float() / 255
    x_BCHW = _resample(x_BCHW, generator).clamp(0, 1)
    x_BCHW = _jitter_colour(x_BCHW, generator).clamp(0, 1)
    mask_B1HW = _mixing_mask(x_BCHW, generator)
    x_BCHW = mask_B1HW * x_BCHW + (1 - mask_B1HW) * x_BCHW.roll(1, 0)
    return (x_BCHW * 255).round().to(torch.uint8)


def to_model_input(images_BCHW: Tensor, size: int, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """uint8 images as a model's normalised float32 input, (B, C, size, size); bicubic resize."""
    x_BCHW = images_BCHW.float() / 255
    if size != x_BCHW.shape[-1]:
        x_BCHW = F.interpolate(x_BCHW, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (x_BCHW - mean_C.view(1, -1, 1, 1)) / std_C.view(1, -1, 1, 1)


def _uniform(like: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One number per image of `like`, (B,), uniform in [low, high)."""
    return low + (high - low) * torch.rand(len(like), device=like.device, generator=generator)


def _resample(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random resized crop with flip and rotation, as one bicubic resampling; float in [0, 1], may overshoot.

    The area is 0.3 to 1.2 of the image: above 1 the view zooms out with reflected borders, so that the original
    image lies inside the training distribution and not at its edge.
    """
    area_B = _uniform(x_BCHW, generator, 0.3, 1.2)
    ratio_B = torch.exp(_uniform(x_BCHW, generator, math.log(3 / 4), math.log(4 / 3)))
    width_B, height_B = (area_B * ratio_B).sqrt(), (area_B / ratio_B).sqrt()
    centre_x_B = _uniform(x_BCHW, generator, -1, 1) * (1 - width_B).abs()
    centre_y_B = _uniform(x_BCHW, generator, -1, 1) * (1 - height_B).abs()
    angle_B = MAX_ROTATION_STD * torch.randn(len(x_BCHW), device=x_BCHW.device, generator=generator)
    flip_B = torch.where(_uniform(x_BCHW, generator) < 0.5, -1.0, 1.0)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    row_x_B3 = torch.stack([flip_B * width_B * cos_B, -height_B * sin_B, centre_x_B], dim=1)
    row_y_B3 = torch.stack([flip_B * width_B * sin_B, height_B * cos_B, centre_y_B], dim=1)
    theta_B23 = torch.stack([row_x_B3, row_y_B3], dim=1)
    grid_BHW2 = F.affine_grid(theta_B23, list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid_BHW2, mode="bicubic", padding_mode="reflection", align_corners=False)


def _jitter_colour(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation by factors in [0.6, 1.4] on 80 % of the images; 10 % become grey."""
    active_B = _uniform(x_BCHW, generator) < 0.8
    ones_B = torch.ones_like(active_B, dtype=torch.float32)
    factors_B = [torch.where(active_B, _uniform(x_BCHW, generator, 0.6, 1.4), ones_B) for _ in range(3)]
    brightness, contrast, saturation = (factor_B.view(-1, 1, 1, 1) for factor_B in factors_B)
    grey_B = _uniform(x_BCHW, generator) < 0.1
    saturation = torch.where(grey_B.view(-1, 1, 1, 1), torch.zeros_like(saturation), saturation)
    x_BCHW = (x_BCHW * brightness).clamp(0, 1)
    level_B111 = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    x_BCHW = (level_B111 + contrast * (x_BCHW - level_B111)).clamp(0, 1)
    luma_C = torch.tensor([0.299, 0.587, 0.114], device=x_BCHW.device)
    luma_B1HW = (x_BCHW * luma_C.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return luma_B1HW + saturation * (x_BCHW - luma_B1HW)


def _mixing_mask(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """The share of the image itself in each pixel, (B, 1, H, W): a quarter mixup, a quarter CutMix, else 1.

    Mixed images need no mixed labels here, because the teacher provides the targets.
    """
    batch, _, height, width = x_BCHW.shape
    kind_B = _uniform(x_BCHW, generator).view(-1, 1, 1, 1)
    keep_B = _uniform(x_BCHW, generator).view(-1, 1, 1, 1)
    half_side_B = (1 - keep_B).sqrt() / 2
    centre_y_B = _uniform(x_BCHW, generator).view(-1, 1, 1, 1)
    centre_x_B = _uniform(x_BCHW, generator).view(-1, 1, 1, 1)
    y_H1 = ((torch.arange(height, device=x_BCHW.device) + 0.5) / height).view(1, 1, -1, 1)
    x_1W = ((torch.arange(width, device=x_BCHW.device) + 0.5) / width).view(1, 1, 1, -1)
    inside_B1HW = ((y_H1 - centre_y_B).abs() < half_side_B) & ((x_1W - centre_x_B).abs() < half_side_B)
    whole_B1HW = torch.ones(batch, 1, height, width, device=x_BCHW.device)
    mask_B1HW = torch.where(kind_B < 0.25, keep_B * whole_B1HW, whole_B1HW)
    cut = (kind_B >= 0.25) & (kind_B < 0.5)
    return torch.where(cut, 1 - inside_B1HW.float(), mask_B1HW)
