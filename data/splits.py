"""DataConfig, and load_splits, which loads and splits a dataset."""

import hashlib
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, warn
from common.imports import lazy_imports
from common.paths import absolute, cache_folder
from common.text import counted
from data.image_set import ImageSet, Splits
from data.registry import DATASETS, Dataset, explain_datasets


@dataclass
class DataConfig:
    """Data: which images, and how they are split."""

    name: str = field(default="cifar100", metadata={"help": explain_datasets})
    root: Path | None = None
    """Folder of the dataset, or for its download; null: `data` in $VISION_MOE_CACHE or ~/.cache/vision_moe."""
    clearml_dataset: str | None = None
    """PROJECT/NAME or id of a ClearML dataset, which is downloaded and used as data.root; null: none."""
    download: bool = True
    """Download the dataset if it is missing."""
    validation: float = 0.1
    """Fraction of the training images held out for validation, stratified by class."""
    test: float = 0.2
    """Fraction held out for testing if the dataset has no test set."""
    split_seed: int = 0
    """Seed of both splits; use the same seed for runs that you compare."""
    image_size: int = 224
    """Side in pixels to which your own images are resized and centre-cropped."""
    max_classes: int | None = None
    """Use only this many classes (for a quick experiment); null: all."""
    max_per_class: int | None = None
    """Use at most this many training images, and as many test images, of each class; null: all."""

    shots: int | None = None
    """Train on this many images per class, drawn from the training images with split_seed; validation and test images
    stay the same. null: all."""

    def __post_init__(self):
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"data.shots is {self.shots}: it must be at least 1 image per class")
        if self.name not in DATASETS:
            raise ValueError(f"data.name is '{self.name}': use one of {', '.join(sorted(DATASETS))}")
        if self.clearml_dataset is not None and not self.clearml_dataset.strip("/ "):
            raise ValueError(f"data.clearml_dataset is '{self.clearml_dataset}': give PROJECT/NAME or an id, or null")
        self.root = None if self.root is None else absolute(self.root)
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"data.{name} is {value}: it must be a fraction between 0 and 1")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"data.split_seed is {self.split_seed}: it must be at least 0 and below 2^32")
        if self.image_size < 8:
            raise ValueError(f"data.image_size is {self.image_size}: use 8 pixels or more")
        if self.max_classes is not None and self.max_classes < 2:
            raise ValueError(f"data.max_classes is {self.max_classes}: a classifier needs at least 2")
        if self.max_per_class is not None and self.max_per_class < 2:
            raise ValueError(f"data.max_per_class is {self.max_per_class}: it must be at least 2, one for each split")

    @property
    def _set(self) -> Dataset:
        return DATASETS[self.name]

    @property
    def side(self) -> int:
        """Side in pixels of the images, before the backbone resizes them: the dataset's, or image_size."""
        return self._set.side or self.image_size

    @property
    def grey(self) -> bool:
        """Whether the images have no colour."""
        return self._set.grey

    @property
    def idle(self) -> list[str]:
        """One line for each changed option that this dataset does not read."""
        lines = []
        for item in fields(self):
            readers = sorted(name for name, found in DATASETS.items() if item.name in found.options)
            value = getattr(self, item.name)
            usual = (item.default, absolute(cache_folder("data")))  # older runs stored the default folder of CIFAR-100
            if readers and self.name not in readers and value not in usual:
                only = " and ".join(readers) + (" read it" if len(readers) > 1 else " reads it")
                lines.append(f"data.{item.name} {value} has no effect with data.name {self.name}: only {only}")
        return lines

    @property
    def place(self) -> Path | None:
        """The folder of the dataset: data.root, or its default; None if there is neither."""
        default = self._set.default_root
        return absolute(cache_folder(default)) if self.root is None and default is not None else self.root

    def require_place(self, what: str) -> Path:
        """`place`. what: what it should be, for the message. Raises UserError if there is none."""
        if self.place is None:
            raise UserError(f"data.name {self.name} needs --data.root: name {what}")
        return self.place


def load_splits(config: DataConfig) -> Splits:
    """Load a dataset and split it.

    Raises UserError for data that is missing, altered, or too small to split, and EnvironmentFault if a download fails.
    """
    for line in config.idle:
        warn(line)
    train, validation, test = DATASETS[config.name].load(config)
    if config.max_classes is not None or config.max_per_class is not None:
        train, validation, test = (part and _limit(part, config) for part in (train, validation, test))
    _require_enough(train, 1 + (validation is None) + (test is None))
    if test is None:
        train, test = stratified_split(train, config.test, config.split_seed, "data.test")
    if validation is None:
        train, validation = stratified_split(train, config.validation, config.split_seed, "data.validation")
    if config.shots is not None:
        train = few_of_each(train, config.shots, config.split_seed)
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if not len(part):
            raise UserError(f"the {name} split has no image of the remaining classes: raise data.max_classes")
        lacking = np.setdiff1d(np.arange(train.num_classes), part.labels_N.numpy())
        if len(lacking):
            warn(
                f"the {name} split has no image of {len(lacking)} of the {train.num_classes} classes "
                f"('{train.class_names[lacking[0]]}'): each counts as 0 in its macro-F1"
            )
    splits = Splits(train, validation, test)
    if not DATASETS[config.name].published:
        _warn_of_copies(splits)
    return splits


def _require_enough(train: ImageSet, parts: int) -> None:
    """Raise UserError if a class has fewer images than the number of parts into which train is split."""
    counts_C = torch.bincount(train.labels_N, minlength=train.num_classes)
    if parts > 1 and counts_C.min() < parts:
        name, count = train.class_names[int(counts_C.argmin())], counted(int(counts_C.min()), "image")
        splits = {2: "two splits", 3: "three splits (data.validation, data.test)"}[parts]
        raise UserError(
            f"class '{name}' has {count} for {splits}: each class needs at least {parts}; add images "
            "(or raise data.max_per_class, if it is set)"
        )


def _warn_of_copies(splits: Splits) -> None:
    """Warn about validation and test images that are also training images: they inflate the scores."""
    seen: set[bytes] = set()
    for name in ("train", "validation", "test"):
        images_NCHW = splits[name].images_NCHW.contiguous().numpy()
        digests = [hashlib.blake2b(image_CHW, digest_size=16).digest() for image_CHW in images_NCHW]
        if copies := sum(digest in seen for digest in digests):
            warn(
                f"{copies:,} of {len(digests):,} {name} images are exact copies of images in another split: they "
                "make the score too high"
            )
        seen.update(digests)


def _limit(images: ImageSet, config: DataConfig) -> ImageSet:
    """The first `max_classes` classes and the first `max_per_class` images of each."""
    classes = min(config.max_classes or images.num_classes, images.num_classes)
    keep = []
    for label in range(classes):
        positions = torch.nonzero(images.labels_N == label).flatten()
        keep.append(positions[: config.max_per_class])
    kept = images.subset(torch.cat(keep).sort().values)
    return replace(kept, class_names=images.class_names[:classes])


def few_of_each(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """At most `shots` images of each class, drawn with the seed; a smaller number is a subset of a larger one."""
    generator, kept = torch.Generator().manual_seed(seed), []
    for label in range(images.num_classes):
        positions = torch.nonzero(images.labels_N == label).flatten()
        kept.append(positions[torch.randperm(len(positions), generator=generator)][:shots])
        if len(positions) < shots:
            warn(f"data.shots {shots}: class '{images.class_names[label]}' has {counted(len(positions), 'image')}")
    return images.subset(torch.cat(kept).sort().values)


def stratified_split(images: ImageSet, fraction: float, seed: int, option: str) -> tuple[ImageSet, ImageSet]:
    """Stratified split into (the rest, `fraction` of the images), reproducible by seed.

    At least as many images as classes are held out, with a warning if that is more than the fraction.
    option: the configuration field of the fraction, for messages.
    Raises UserError if too few images would remain, or if a class has fewer than two.
    """
    with lazy_imports():  # here, because importing scikit-learn takes seconds
        from sklearn.model_selection import train_test_split

    _require_enough(images, 2)
    count, what = math.ceil(fraction * len(images)), f"{option} {fraction} of {len(images)} images"
    if count < images.num_classes:
        count = images.num_classes
        warn(f"{what} is less than one for each of the {count} classes: {count} images are held out")
    try:
        rest, held_out = train_test_split(
            np.arange(len(images)), test_size=count, random_state=seed, stratify=images.labels_N.numpy()
        )
    except ValueError as error:
        most = 1 - math.ceil(100 * images.num_classes / len(images)) / 100
        raise UserError(
            f"{what} leaves too few for all {images.num_classes} classes: use a smaller fraction, at most {most:g}, "
            "or more images"
        ) from error
    return images.subset(torch.from_numpy(np.sort(rest))), images.subset(torch.from_numpy(np.sort(held_out)))
