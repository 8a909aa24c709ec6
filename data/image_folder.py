"""A folder of images, ROOT/{train,val,test}/CLASS/*.png, read into memory at one size."""

from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError
from common.text import printable
from data.image_file import read_picture
from data.image_set import ImageSet
from data.image_tree import LeftOut, find_classes, find_splits, label_files


def load_image_folder(root: Path, size: int) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """Train, validation (or None) and test (or None) under `root`; the classes are the folders of `root`/train.

    size: side in pixels; the shorter side is resized to it (bicubic, antialiased), then the centre cropped.
    Which files count is said in `data.image_tree`. Raises UserError for a missing train/, fewer than two classes, a
    class that train/ does not have, or a file that is not a readable image.
    """
    left_out = LeftOut()
    splits = find_splits(root, left_out)
    names = [path.name for path in find_classes(splits["train"], LeftOut())]
    if len(names) < 2:
        left_out.tell()
        raise UserError(f"{splits['train']} holds {len(names)} class folder(s): a classifier needs at least 2")
    labelled = label_files(splits, names, left_out)
    left_out.tell()
    shown = tuple(map(printable, names))
    parts = {name: _read(splits[name], files, shown, size) for name, files in labelled.items()}
    return parts["train"], parts.get("validation"), parts.get("test")


def _read(folder: Path, files: Sequence[tuple[Path, int]], names: tuple[str, ...], size: int) -> ImageSet:
    images_NCHW = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    failures = []
    for row, (path, _) in enumerate(files):
        try:
            images_NCHW[row] = read_picture(path, size).pixels_CHW
        except UserError as error:
            failures.append(error)
    if failures:
        raise UserError(f"{failures[0]} ({len(failures)} of {len(files)} files in {folder})") from failures[0]
    return ImageSet(images_NCHW, torch.tensor([label for _, label in files]), names)
