"""The reference of predict.py --reject: measured once on the images of a run, and stored in its folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from assembly.replay import load_images
from common.errors import UserError
from common.paths import absolute
from common.text import counted
from data.image_set import ImageSet
from evaluation.trained import TrainedRun
from evaluation.unlike import Unlike
from model.preparation import prepare

FILE = "unlike.safetensors"
MOST = 10_000  # limit of training images, and of validation images, that are measured


def load_unlike(trained: TrainedRun, root: Path | None, say: Callable[[str], None]) -> Unlike:
    """The reference of a run, computed from its images if it does not exist yet.

    root: folder of the dataset, if it has moved. Raises UserError if the images are needed but not available.
    """
    path = trained.run.path / FILE
    if path.is_file():
        return Unlike.load(path)
    data = trained.config.data
    if root is not None:
        data.root = absolute(root)
    try:
        splits = load_images(trained.config)
    except UserError as error:
        raise UserError(
            f"--reject needs the training images once to write {path}: {error} (name the folder with --data.root)"
        ) from error
    train, validation = some(splits.train), some(splits.validation)
    say(f"computing {path} once from {counted(len(train) + len(validation), 'image')} of the run's dataset")
    features = [frozen_features(trained, part.images_NCHW) for part in (train, validation)]
    found = Unlike.of(features[0], train.labels_N, train.num_classes, features[1])
    found.save(path)
    return found


def some(images: ImageSet) -> ImageSet:
    """At most MOST images, spread evenly over the set."""
    count = min(len(images), MOST)
    return images.subset(torch.linspace(0, len(images) - 1, count).round().long().unique())


@torch.no_grad()
def frozen_features(trained: TrainedRun, images_NCHW: Tensor) -> Tensor:
    """Features of uint8 images from the frozen ViT, float32 (N, F) on the CPU: the last of backbone.features, or the
    mean of its tokens."""
    backbone, found = trained.backbone, []
    for part in images_NCHW.split(trained.config.features.batch_size):
        images = prepare(part.to(trained.device), backbone.image_size, backbone.mean, backbone.std)
        features = backbone(images)
        features = features.mean(dim=1) if features.ndim == 3 else features.chunk(len(backbone.features), dim=1)[-1]
        found.append(features.float().cpu())
    return torch.cat(found)
