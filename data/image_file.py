"""One image file of any format that Pillow reads, as a small square of uint8 RGB, in bounded memory."""

import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError, one_line
from data.image_tree import formats

MIN_SIDE = 4
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a suspicious image: 268 MB as RGB
# JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as long as that leaves so many pixels for each one wanted.
DRAFT_FACTOR = 4
BITS, PHOTOMETRIC = 258, 262  # tags of a TIFF


@dataclass(frozen=True)
class Picture:
    """pixels_CHW: uint8 RGB (3, size, size). notes: what a viewer of the file might not expect, such as "first of 12
    frames"."""

    pixels_CHW: Tensor
    notes: tuple[str, ...] = ()


def read_picture(path: Path, size: int, grey: bool = False) -> Picture:
    """The centre square of an image file, turned upright by its EXIF orientation and resized to `size` pixels.

    Bicubic and antialiased; the first frame of an animation; transparent parts on white; deeper grey scaled to
    8 bits; CMYK without its colour profile; grey: without colour. Raises UserError, in one line, for a file
    that Pillow cannot read, a side below MIN_SIDE, or more than MAX_PIXELS to decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata and of large images, which are checked here
            _require_regular(path)
            with Image.open(path, formats=formats()) as image:
                return _read(image, path, size, grey)
    except UserError:
        raise
    except FileNotFoundError as error:
        what = "is a link to nothing: remove it" if path.is_symlink() else "is not there: check the name"
        raise UserError(f"{path} {what}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} cannot be read as an image (of no format that Pillow knows): convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {2 * MAX_PIXELS // 10**6} megapixels: make it smaller first") from error
    except Exception as error:  # bytes that are no image make the decoders fail in every way there is
        reason = one_line(error, 120) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): repair or remove it") from error


def _require_regular(path: Path) -> None:
    """Raise UserError for what has no end, or no bytes: to open a pipe waits for whoever writes to it."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, not an image")


def _check_claim(image: Image.Image, size: int) -> None:
    """Raise ValueError where a small file claims so many pixels that memory would be taken for nothing."""
    if image.width * image.height > max(16_000_000, 1000 * size):
        raise ValueError(f"it claims {image.width} x {image.height} pixels in {size:,} bytes")


def _read(image: Image.Image, path: Path, size: int, grey: bool) -> Picture:
    if min(image.size) < MIN_SIDE:
        raise UserError(
            f"{path} is {image.width} x {image.height} pixels: a side of less than {MIN_SIDE} shows nothing"
        )
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's photo and its previews
    image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{path} has {image.width * image.height / 1e6:.0f} megapixels, and at most {MAX_PIXELS // 10**6} are "
            "decoded: make it smaller first, or a JPEG, which is decoded at a lower resolution"
        )
    _check_claim(image, path.stat().st_size)
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    notes = [f"first of {frames} frames"] if frames > 1 else []
    if image.mode == "CMYK":
        notes.append("CMYK, colours without their profile")
    # Cropped before and turned after all else: only the small square is held a second time.
    square = image.crop((left, top, left + side, top + side))
    if _is_deep(image):
        square, note = _scaled(square, image)
        notes.append(note)
    small = _as_rgb(square).resize((size, size), Image.Resampling.BICUBIC)
    small.getexif()[ExifTags.Base.Orientation] = orientation
    small = ImageOps.exif_transpose(small)
    if grey:
        small = small.convert("L").convert("RGB")
    return Picture(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(), tuple(notes))


def _is_deep(image: Image.Image) -> bool:
    """Whether a pixel is one number of more than eight bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _white(values_HW: np.ndarray, file: Image.Image) -> float:
    """The number that is shown white: that of the format, else the smallest usual one that no pixel exceeds."""
    if values_HW.dtype.kind != "f" and (file.mode.startswith("I;16") or file.format in ("PNG", "PPM")):
        bits = file.tag_v2.get(BITS, (16,))[0] if file.format == "TIFF" else 16
        return 2**bits - 1
    largest = values_HW[np.isfinite(values_HW)].max(initial=0)
    usual = (1, 255, 65535) if values_HW.dtype.kind == "f" else (255, 65535)
    return next((white for white in usual if largest <= white), float(largest))


def _scaled(image: Image.Image, file: Image.Image) -> tuple[Image.Image, str]:
    """A deep image in eight bits, where Pillow would show all above 255 white; and a note that says so.

    file: the image as it was opened, which knows its format.
    """
    values_HW = np.asarray(image)
    white = _white(values_HW, file)
    if values_HW.dtype.kind == "f":
        values_HW = np.nan_to_num(values_HW, nan=0, posinf=white, neginf=0)
    values_HW = values_HW.clip(0, white)
    if file.format == "TIFF" and file.tag_v2.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds for 8 bits alone
        values_HW = white - values_HW
    whole = isinstance(white, int) and values_HW.dtype.kind != "f"
    grey_HW = values_HW.astype(np.int32) * 256 // (white + 1) if whole else values_HW * np.float32(255 / white)
    bits = white.bit_length() if whole and file.mode.startswith("I;16") else 32
    note = f"{bits} bits a pixel, {'scaled to 8' if bits < 32 else f'{white:g} taken as white'}"
    return Image.fromarray(grey_HW.astype(np.uint8)), note


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, without transparency."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
