"""The features for the heads of benchmarks/incremental.py and narrow.py, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from features.bank import FeatureBank


@dataclass(frozen=True)
class Data:
    """Views (V, N, F) of the training images, and features and labels of unchanged validation and test images.

    groups: number of equally wide features in a vector.
    """

    train_VNF: Tensor
    labels_N: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    groups: int

    @classmethod
    def of(cls, bank: FeatureBank, views: int, groups: int) -> "Data":
        """Extract all features from the bank."""

        def whole(split: str, view: int | None = None) -> tuple[Tensor, Tensor]:
            features, labels = zip(*bank.batches(split, 1024, view=view), strict=True)
            return torch.cat(features), torch.cat(labels)

        parts = [whole("train", view if bank.augment.active else None) for view in range(views)]
        train_VNF = torch.stack([features for features, _ in parts])
        return cls(train_VNF, parts[0][1], whole("validation"), whole("test"), groups)

    def beside(self, other: "Data") -> "Data":
        """These features of each image and view, concatenated with the others."""

        def both(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return torch.cat([mine[0], theirs[0]], dim=1), mine[1]

        train_VNF = torch.cat([self.train_VNF, other.train_VNF], dim=2)
        validation, test = both(self.validation, other.validation), both(self.test, other.test)
        return Data(train_VNF, self.labels_N, validation, test, self.groups + other.groups)
