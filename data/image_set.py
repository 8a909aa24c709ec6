"""ImageSet and Splits: labelled images in memory."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common.errors import EnvironmentFault, UserError
from common.memory import available_memory


@dataclass(frozen=True)
class ImageSet:
    """N labelled images in memory.

    images_NCHW: uint8 RGB. labels_N: int64 in [0, C). coarse_N: int64 superclass of each image, or None.
    Raises UserError for a label without a class, and for two classes with one name.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    class_names: tuple[str, ...]
    coarse_N: Tensor | None = None
    coarse_names: tuple[str, ...] = ()

    def __post_init__(self):
        if len(set(self.class_names)) < self.num_classes:
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise UserError(f"two classes have the name '{twice}': give them different names")
        if len(self.labels_N) != len(self.images_NCHW):
            raise UserError(f"there are {len(self.images_NCHW)} images but {len(self.labels_N)} labels")
        if len(self) and not 0 <= int(self.labels_N.min()) <= int(self.labels_N.max()) < self.num_classes:
            low, high = int(self.labels_N.min()), int(self.labels_N.max())
            raise UserError(
                f"labels go from {low} to {high}; {self.num_classes} classes have 0 to {self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices_M: Tensor) -> "ImageSet":
        """The images at these positions, in this order."""
        coarse_M = None if self.coarse_N is None else self.coarse_N[indices_M]
        return replace(
            self,
            images_NCHW=self.images_NCHW[indices_M],
            labels_N=self.labels_N[indices_M],
            coarse_N=coarse_M,
        )

    def fingerprint(self) -> str:
        """SHA-256 over images and labels: equal fingerprints mean equal data in equal order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.images_NCHW.shape)).encode())
        digest.update(self.images_NCHW.contiguous().numpy())
        digest.update(self.labels_N.numpy())
        return digest.hexdigest()

    def superclass_of_class(self) -> np.ndarray | None:
        """The superclass of each class (C,), or None if the dataset has no superclasses."""
        if self.coarse_N is None:
            return None
        groups_C = np.zeros(self.num_classes, dtype=np.int64)
        groups_C[self.labels_N.numpy()] = self.coarse_N.numpy()
        return groups_C


def empty_images(count: int, size: int) -> Tensor:
    """An empty tensor for `count` images, uint8 (count, 3, size, size). Raises EnvironmentFault if memory is short."""
    needed, free = 3 * count * size * size, available_memory()
    if free is not None and needed > free:
        raise EnvironmentFault(
            f"{count:,} images of {size} x {size} pixels need {needed / 1e9:,.1f} GB of memory, but only "
            f"{free / 1e9:,.1f} GB are free: lower --data.image_size, or use fewer images"
        )
    return torch.empty(count, 3, size, size, dtype=torch.uint8)


@dataclass(frozen=True)
class Splits:
    """The splits: train; validation, for choosing epochs and settings; test, used once per run."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def __getitem__(self, name: str) -> ImageSet:
        return getattr(self, name)
