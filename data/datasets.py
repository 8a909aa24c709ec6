"""Image sets and their splits: CIFAR-100, scikit-learn's digits, a folder of images."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.errors import UserError, warn
from common.paths import absolute
from data.image_set import ImageSet, Splits


@dataclass
class DataConfig:
    """Data: which images, and how they are split."""

    name: Literal["cifar100", "digits", "folder"] = "cifar100"
    """cifar100 (downloaded by torchvision), digits (comes with scikit-learn), or folder (ROOT/train/CLASS/*.png)."""
    root: Path = field(default_factory=lambda: Path(os.environ.get("VISION_MOE_CACHE", "~/.cache/vision_moe")) / "data")
    """Where the data set lies or is downloaded to; for folder, what holds train/ and maybe val/, test/."""
    download: bool = True
    """Download CIFAR-100 where it is missing."""
    validation: float = 0.1
    """Fraction of the training images held out, stratified by class, to choose epochs and settings on."""
    test: float = 0.2
    """Fraction held out as test set where the data set has none of its own (digits; a folder without test/)."""
    split_seed: int = 0
    """Seed of both splits; runs that are to be compared share it."""
    image_size: int = 224
    """Side in pixels that the images of a folder are resized and centre-cropped to."""
    max_classes: int | None = None
    """Keep only the first so many classes (a quick experiment); null: all."""
    max_per_class: int | None = None
    """Keep at most so many training and as many test images of each class; null: all."""

    def __post_init__(self):
        self.root = absolute(self.root)
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"data.{name} is {value}: it is a fraction between 0 and 1")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"data.split_seed is {self.split_seed}: it must be at least 0 and below 2^32")
        if self.image_size < 8:
            raise ValueError(f"data.image_size is {self.image_size}: use 8 pixels or more")
        if self.max_classes is not None and self.max_classes < 2:
            raise ValueError(f"data.max_classes is {self.max_classes}: a classifier needs at least 2")
        if self.max_per_class is not None and self.max_per_class < 2:
            raise ValueError(f"data.max_per_class is {self.max_per_class}: both splits need one, so at least 2")

    @property
    def side(self) -> int:
        """Side in pixels of the images, before the backbone's own resizing: the data set's, or image_size."""
        return {"cifar100": 32, "digits": 8}.get(self.name, self.image_size)

    @property
    def grey(self) -> bool:
        """Whether the data set has no colour."""
        return self.name == "digits"


def load_splits(config: DataConfig) -> Splits:
    """Load the configured images and split them.

    Raises UserError for data that is missing, altered, or too small to split, and
    EnvironmentFault where a download is needed and cannot be had.
    """
    train, validation, test = _load(config)
    if config.max_classes is not None or config.max_per_class is not None:
        train, validation, test = (part and _limit(part, config) for part in (train, validation, test))
    if test is None:
        train, test = stratified_split(train, config.test, config.split_seed, "data.test")
    if validation is None:
        train, validation = stratified_split(train, config.validation, config.split_seed, "data.validation")
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if not len(part):
            raise UserError(f"the {name} split has no image of the classes that are left: raise data.max_classes")
        lacking = np.setdiff1d(np.arange(train.num_classes), part.labels_N.numpy())
        if len(lacking):
            warn(
                f"the {name} split has no image of {len(lacking)} of the {train.num_classes} classes "
                f"('{train.class_names[lacking[0]]}'): each counts as 0 in its macro-F1"
            )
    return Splits(train, validation, test)


def _load(config: DataConfig) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """Train, validation and test as the data set itself has them."""
    if config.name == "cifar100":
        from data.cifar100 import load_cifar100

        train, test = load_cifar100(config.root, config.download)
        return train, None, test
    if config.name == "folder":
        from data.image_folder import load_image_folder

        return load_image_folder(config.root, config.image_size)
    return load_digits(), None, None


def load_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 grey values 0..16, here as uint8 RGB."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey_NHW = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return ImageSet(
        images_NCHW=grey_NHW[:, None].repeat(1, 3, 1, 1),
        labels_N=torch.from_numpy(digits.target.astype(np.int64)),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def _limit(images: ImageSet, config: DataConfig) -> ImageSet:
    """The first `max_classes` classes and the first `max_per_class` images of each."""
    classes = min(config.max_classes or images.num_classes, images.num_classes)
    keep = []
    for label in range(classes):
        positions = torch.nonzero(images.labels_N == label).flatten()
        keep.append(positions[: config.max_per_class])
    kept = images.subset(torch.cat(keep).sort().values)
    return replace(kept, class_names=images.class_names[:classes])


def stratified_split(images: ImageSet, fraction: float, seed: int, option: str) -> tuple[ImageSet, ImageSet]:
    """Split into (the rest, `fraction` of the images), every class in proportion, the same for the same seed.

    option: the configuration field that asked for the fraction, for the message.
    Raises UserError where a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    counts_C = torch.bincount(images.labels_N, minlength=images.num_classes)
    if counts_C.min() < 2:
        name, count = images.class_names[int(counts_C.argmin())], int(counts_C.min())
        raise UserError(f"class '{name}' has {count} image(s): {option} needs at least 2 of each class to split")
    try:
        rest, held_out = train_test_split(
            np.arange(len(images)), test_size=fraction, random_state=seed, stratify=images.labels_N.numpy()
        )
    except ValueError as error:
        raise UserError(
            f"{option} {fraction} of {len(images)} images cannot hold all {images.num_classes} classes: use a larger "
            f"fraction, from {images.num_classes / len(images):.2g} up, or more images"
        ) from error
    return images.subset(torch.from_numpy(np.sort(rest))), images.subset(torch.from_numpy(np.sort(held_out)))
