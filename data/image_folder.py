"""A folder of images, ROOT/{train,val,test}/CLASS/*.png, read into memory at one size."""

from pathlib import Path

import torch

from common.errors import UserError
from data.image_file import read_picture
from data.image_set import ImageSet


def load_image_folder(root: Path, size: int) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """Train, val (or None) and test (or None) under `root`; the classes are the folders of `root`/train.

    size: side in pixels; the shorter side is resized to it (bicubic, antialiased), then the centre cropped.
    Raises UserError for a missing train/, fewer than two classes, a class that train/ does not
    have, or a file that is not a readable image.
    """
    train_folder = root / "train"
    if not train_folder.is_dir():
        parent, name = root.absolute().parent, root.absolute().name
        if name in ("train", "val", "test") and (parent / "train").is_dir():
            raise UserError(f"--data.root {root} is the {name} folder of a data set: name its parent, {parent}")
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
            images_NCHW[row] = read_picture(Path(path), size).pixels_CHW
        except UserError as error:
            failures.append(error)
    if failures:
        raise UserError(f"{failures[0]} ({len(failures)} of {len(files)} files in {folder})") from failures[0]
    return ImageSet(images_NCHW, torch.tensor([label for _, label in files]), names)
