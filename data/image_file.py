"""Reads an image file of any format that Pillow knows as a small square of uint8 RGB, in bounded memory."""

import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError, one_line
from data.image_tree import formats

MIN_SIDE = 4
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a suspicious image: 268 MB as RGB
# JPEGs are decoded at 1/2, 1/4 or 1/8 of their size while at least this many pixels per output pixel remain.
DRAFT_FACTOR = 4
BITS, PHOTOMETRIC = 258, 262  # TIFF tags


@dataclass(frozen=True)
class Picture:
    """pixels_CHW: uint8 RGB (3, size, size). notes: how the file was read, such as "first of 12 frames"."""

    pixels_CHW: Tensor
    notes: tuple[str, ...] = ()


def read_picture(path: Path, size: int, grey: bool = False) -> Picture:
    """The centre square of an image file, rotated by its EXIF orientation and resized to `size` pixels.

    Bicubic and antialiased; the first frame of an animation; transparency on white; 16- and 32-bit grey scaled to 8
    bits; CMYK without its colour profile. grey: without colour. Raises UserError for a file that Pillow cannot read, a
    side below MIN_SIDE, or more than MAX_PIXELS to decode.
    """
    try:
        num_bytes = _regular_size(path)
    except FileNotFoundError as error:
        what = "is a broken link: remove it" if path.is_symlink() else "does not exist: check the name"
        raise UserError(f"{path} {what}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error.strerror}): repair or remove it") from error
    return _decode(path, path, num_bytes, size, grey)


def decode_picture(content: bytes, name: str, size: int) -> Picture:
    """The image in the bytes of an image file, as `read_picture`. name: its name in messages."""
    return _decode(BytesIO(content), name, len(content), size, False)


def _regular_size(path: Path) -> int:
    """The size of a regular file in bytes. Raises UserError for others: opening a pipe waits for its writer."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{path} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}instead of an image"
        )
    return status.st_size


def _decode(source: Path | BytesIO, name: Path | str, num_bytes: int, size: int, grey: bool) -> Picture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and about large images, which are checked here
            with Image.open(source, formats=formats()) as image:
                return _read(image, name, num_bytes, size, grey)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} cannot be read as an image (Pillow does not know its format): convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {2 * MAX_PIXELS // 10**6} megapixels: make it smaller first") from error
    except Exception as error:  # the decoders raise all kinds of errors on corrupt files
        reason = one_line(error, 120) or type(error).__name__
        raise UserError(f"{name} cannot be read as an image ({reason}): repair or remove it") from error


def _check_claim(image: Image.Image, num_bytes: int) -> None:
    """Raise ValueError if a small file claims so many pixels that it must be corrupt."""
    if image.width * image.height > max(16_000_000, 1000 * num_bytes):
        raise ValueError(f"it claims {image.width} x {image.height} pixels in {num_bytes:,} bytes")


def _read(image: Image.Image, name: Path | str, num_bytes: int, size: int, grey: bool) -> Picture:
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{name} is {image.width} x {image.height} pixels: both sides need at least {MIN_SIDE}")
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's photo and its previews
    image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width * image.height / 1e6:.0f} megapixels, but the limit is {MAX_PIXELS // 10**6}: "
            "make it smaller first, or a JPEG, which is decoded at a lower resolution"
        )
    _check_claim(image, num_bytes)
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    notes = [f"first of {frames} frames"] if frames > 1 else []
    if image.mode == "CMYK":
        notes.append("CMYK without its colour profile")
    # Crop first and rotate last: only the small square is copied.
    square = centre_square(image)
    if _is_deep(image):
        square, note = _scaled(square, image)
        notes.append(note)
    small = _as_rgb(square).resize((size, size), Image.Resampling.BICUBIC)
    small.getexif()[ExifTags.Base.Orientation] = orientation
    small = ImageOps.exif_transpose(small)
    if grey:
        small = small.convert("L").convert("RGB")
    return Picture(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(), tuple(notes))


def centre_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _is_deep(image: Image.Image) -> bool:
    """Whether a pixel is a single value of more than eight bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _white(values_HW: np.ndarray, file: Image.Image) -> float:
    """The value of white: that of the format, or else the smallest usual one that no pixel exceeds."""
    if values_HW.dtype.kind != "f" and (file.mode.startswith("I;16") or file.format in ("PNG", "PPM")):
        bits = file.tag_v2.get(BITS, (16,))[0] if file.format == "TIFF" else 16
        return 2**bits - 1
    largest = values_HW[np.isfinite(values_HW)].max(initial=0)
    usual = (1, 255, 65535) if values_HW.dtype.kind == "f" else (255, 65535)
    return next((white for white in usual if largest <= white), float(largest))


def _scaled(image: Image.Image, file: Image.Image) -> tuple[Image.Image, str]:
    """An image of more than eight bits scaled to eight, where Pillow would clip at 255; and a note about it.

    file: the image as opened, which has the format.
    """
    values_HW = np.asarray(image)
    white = _white(values_HW, file)
    if values_HW.dtype.kind == "f":
        values_HW = np.nan_to_num(values_HW, nan=0, posinf=white, neginf=0)
    values_HW = values_HW.clip(0, white)
    if file.format == "TIFF" and file.tag_v2.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow handles only for 8 bits
        values_HW = white - values_HW
    whole = isinstance(white, int) and values_HW.dtype.kind != "f"
    grey_HW = values_HW.astype(np.int32) * 256 // (white + 1) if whole else values_HW * np.float32(255 / white)
    bits = white.bit_length() if whole and file.mode.startswith("I;16") else 32
    note = f"{bits} bits per pixel, {'scaled to 8' if bits < 32 else f'{white:g} taken as white'}"
    return Image.fromarray(grey_HW.astype(np.uint8)), note


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per channel, without transparency."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
