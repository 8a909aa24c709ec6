"""The images of a run: those of its dataset and, with replay, some of the run that it starts from."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.distributed import world
from common.errors import UserError, as_environment_fault, say
from common.text import counted, printable, quoted
from config.config import Config, config_from_dict
from data.datasets import load_splits
from data.image_set import ImageSet, Splits
from data.splits import few_of_each
from storage.described import describe
from storage.folder import RunFolder
from tracking.datasets import fetch_dataset


def load_images(config: Config) -> Splits:
    """The splits of config.data; with config.replay, joined with those of the run that config.init names.

    config.replay is the number of training images per class of that run. All of its validation and test images are
    used, so that scores include old classes. Raises UserError as `load_splits`, and if the images of that run are not
    available.
    """
    fetch_data(config)
    splits = load_splits(config.data)
    if not config.replay or config.init is None:
        return splits
    with as_environment_fault():
        before = config_from_dict(describe(RunFolder(config.init))["config"])
    try:
        old = load_images(before)
    except UserError as error:
        raise UserError(f"--replay needs the images of {quoted(config.init)}: {error}") from error
    kept = few_of_each(old.train, config.replay, config.data.split_seed)
    names = tuple(dict.fromkeys([*old.train.class_names, *splits.train.class_names]))
    say(
        f"replay: {counted(len(kept), 'training image')} of {counted(old.train.num_classes, 'class')} of "
        f"{printable(config.init)}, and all of its validation and test images"
    )
    return Splits(
        joined(splits.train, kept, names),
        joined(splits.validation, old.validation, names),
        joined(splits.test, old.test, names),
    )


def joined(new: ImageSet, old: ImageSet, names: tuple[str, ...]) -> ImageSet:
    """The images of both sets, the new ones first, with labels by `names`; old ones are resized to the new size.

    An old image that equals a new one pixel by pixel is left out. So are superclasses.
    """
    resized_NCHW = _resized(old.images_NCHW, new.images_NCHW.shape[2:])
    known = {image.tobytes() for image in new.images_NCHW.contiguous().numpy()}
    own = torch.tensor([image.tobytes() not in known for image in resized_NCHW.contiguous().numpy()], dtype=torch.bool)
    labels = [_labels(part, names) for part in (new, old)]
    return ImageSet(
        torch.cat([new.images_NCHW, resized_NCHW[own]]), torch.cat([labels[0], labels[1][own]]), class_names=names
    )


def _labels(images: ImageSet, names: tuple[str, ...]) -> Tensor:
    places = {name: place for place, name in enumerate(names)}
    table_C = torch.from_numpy(np.array([places[name] for name in images.class_names], dtype=np.int64))
    return table_C[images.labels_N]


def _resized(images_NCHW: Tensor, sides: torch.Size) -> Tensor:
    """uint8 images resized with bicubic interpolation and antialiasing."""
    if images_NCHW.shape[2:] == sides:
        return images_NCHW
    parts = [
        F.interpolate(part.float(), tuple(sides), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
        for part in images_NCHW.split(1024)
    ]
    return torch.cat(parts)


def fetch_data(config: Config) -> None:
    """Set data.root to a local copy of data.clearml_dataset, if one is named. Raises as `fetch_dataset`.

    Of several processes the first one downloads; the others find the copy in ClearML's cache.
    """
    if config.data.clearml_dataset is None:
        return
    if world().first:
        config.data.root = fetch_dataset(config.data.clearml_dataset)
    world().wait()
    if not world().first:
        config.data.root = fetch_dataset(config.data.clearml_dataset)
