"""A folder of images, ROOT/{train,val,test}/CLASS/*.png, read into memory at one size."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.datasets import ImageSet
from errors import UserError, one_line

# Those that torchvision's folders have; not PostScript, for which Pillow runs an interpreter.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def load_image_folder(root: Path, size: int) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """Train, val (or None) and test (or None) under `root`; the classes are the folders of `root`/train.

    size: side in pixels; the shorter side is resized to it (bicubic, antialiased), then the centre cropped.
    Raises errors.UserError for a missing train/, fewer than two classes, a class that train/ does not
    have, or a file that is not a readable image.
    """
    train_folder = root / "train"
    if not train_folder.is_dir():
        raise UserError(f"{train_folder} is not a folder: --data.root needs train/CLASS/IMAGE (and maybe val/, test/)")
    names = tuple(sorted(path.name for path in train_folder.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise UserError(f"{train_folder} holds {len(names)} class folder(s): a classifier needs at least 2")
    parts = [_read_split(root / split, names, size) for split in ("train", "val", "test")]
    return parts[0], parts[1], parts[2]


def _read_split(folder: Path, names: tuple[str, ...], size: int) -> ImageSet | None:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    if not folder.is_dir():
        return None
    unknown = sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(names))
    if unknown:
        raise UserError(
            f"{folder} has class folder '{unknown[0]}' that train/ does not have: add it there or remove it"
        )
    class_to_index = {name: index for index, name in enumerate(names)}
    files = make_dataset(str(folder), class_to_index, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise UserError(f"{folder} has no image: expected CLASS/FILE with one of {', '.join(IMG_EXTENSIONS)}")
    if folder.name == "train" and (empty := set(names) - {Path(path).parent.name for path, _ in files}):
        raise UserError(f"{folder / min(empty)} holds no image: add some, or remove the folder")
    images_NCHW = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    failures = []
    for row, (path, _) in enumerate(files):
        try:
            images_NCHW[row] = read_image(Path(path), size)
        except UserError as error:
            failures.append(error)
    if failures:
        raise UserError(f"{failures[0]} ({len(failures)} of {len(files)} files in {folder})") from failures[0]
    return ImageSet(images_NCHW, torch.tensor([label for _, label in files]), names)


def read_image(path: Path, size: int) -> Tensor:
    """One image file as uint8 RGB (3, size, size). Raises errors.UserError where Pillow cannot read it."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_claim(image, path.stat().st_size)
            rgb = _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # bytes that are no image make Pillow fail in every way there is
        raise UserError(f"{path} cannot be read as an image ({one_line(error, 120)}): mend or remove it") from error
    resized = F.resize(F.pil_to_tensor(_not_too_long(rgb)), [size], InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, [size, size])


def _check_claim(image: Image.Image, size: int) -> None:
    """Raise ValueError where a small file claims so many pixels that memory would be taken for nothing."""
    if image.width * image.height > max(16_000_000, 1000 * size):
        raise ValueError(f"it claims {image.width} x {image.height} pixels in {size:,} bytes")


def _not_too_long(image: Image.Image) -> Image.Image:
    """The middle of an image that is very long: resized whole it could fill the memory, of which a crop remains."""
    longest = 16 * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, min(image.width, left + longest), min(image.height, top + longest)))


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel; sixteen are scaled, where Pillow's own conversion would cut everything above 255."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values // 256).astype(np.uint8))
    return image.convert("RGB")
