"""A folder of images, ROOT/{train,val,test}/CLASS/*.png, read into memory at one size."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError, say, warn
from common.text import counted, printable
from data.image_file import read_picture
from data.image_set import ImageSet, empty_images
from data.image_tree import Skipped, find_classes, find_splits, label_files
from data.registry import Parts, register


@register("folder", about="your own images, ROOT/train/CLASS/*.png or ROOT/CLASS/*.png", options=("root", "image_size"))
def load(config) -> Parts:
    """Load the splits of the folder."""
    root = config.require_place("the folder with train/CLASS/*.png, or CLASS/*.png")
    parts = load_image_folder(root, config.image_size)
    if parts[1] is None and parts[2] is None:
        say(
            f"{root} has neither val/ nor test/: {config.test:.0%} of each class are used for testing and "
            f"{config.validation:.0%} of the rest for validation, drawn with data.split_seed {config.split_seed}"
        )
    return parts


def load_image_folder(root: Path, size: int) -> Parts:
    """Train, validation (or None) and test (or None) under `root`; the classes are the folders of `root`/train, or of
    `root` where it has no split.

    size: side in pixels; the shorter side is resized to it (bicubic, antialiased), then the centre cropped.
    `data.image_tree` defines which files count. Raises UserError for a missing train/, fewer than two classes, a class
    that train/ does not have, or a file that is not a readable image.
    """
    skipped = Skipped()
    splits = find_splits(root, skipped)
    names = [path.name for path in find_classes(splits["train"], Skipped())]
    if len(names) < 2:
        skipped.warn()
        raise UserError(f"{splits['train']} has {counted(len(names), 'class folder')}: a classifier needs at least 2")
    labelled = label_files(splits, names, skipped)
    skipped.warn()
    shown = tuple(map(printable, names))
    parts = {name: _read(splits[name], files, shown, size) for name, files in labelled.items()}
    return parts["train"], parts.get("validation"), parts.get("test")


def _read(folder: Path, files: Sequence[tuple[Path, int]], names: tuple[str, ...], size: int) -> ImageSet:
    images_NCHW = empty_images(len(files), size)
    failures, notes = [], Counter()
    for row, (path, _) in enumerate(files):
        try:
            picture = read_picture(path, size)
            images_NCHW[row] = picture.pixels_CHW
            notes.update(picture.notes)
        except UserError as error:
            failures.append(error)
    if failures:
        raise UserError(f"{failures[0]} ({len(failures)} of {len(files)} files in {folder})") from failures[0]
    for note, count in notes.items():
        warn(f"{count:,} of {len(files):,} images in {folder}: {note}")
    return ImageSet(images_NCHW, torch.tensor([label for _, label in files]), names)
