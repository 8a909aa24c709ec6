"""Images unlike the training images: the distance of their frozen features from the nearest class."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically

QUANTILES = 1001  # stored quantiles of the distances of validation images


@dataclass(frozen=True)
class Unlike:
    """The Mahalanobis distance of features from the nearest class (Lee 2018), and the distances of validation images.

    means_CF: of each class. whitening_FF: features multiplied by it have the identity matrix as within-class
    covariance. quantiles_Q: evenly spaced quantiles of the distances of validation images, ascending.
    """

    means_CF: Tensor
    whitening_FF: Tensor
    quantiles_Q: Tensor

    @classmethod
    def of(cls, train_NF: Tensor, labels_N: Tensor, num_classes: int, validation_MF: Tensor) -> "Unlike":
        """Fit to features of training and validation images, with a shrunk covariance (Ledoit and Wolf 2004)."""
        from sklearn.covariance import ledoit_wolf

        train_NF = train_NF.double()
        counts_C = torch.bincount(labels_N, minlength=num_classes)
        sums_CF = torch.zeros(num_classes, train_NF.shape[1], dtype=torch.float64).index_add_(0, labels_N, train_NF)
        means_CF = sums_CF / counts_C[:, None].clamp_min(1)
        covariance_FF, _ = ledoit_wolf((train_NF - means_CF[labels_N]).numpy(), assume_centered=True)
        values, vectors = np.linalg.eigh(covariance_FF)
        kept = values > 1e-10 * values.max()  # drops constant features
        whitening_FF = torch.from_numpy(vectors[:, kept] / np.sqrt(values[kept]))
        means_CF = means_CF[counts_C > 0]
        found = cls(means_CF.float(), whitening_FF.float(), torch.zeros(0))
        shares = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        return cls(found.means_CF, found.whitening_FF, found.distances(validation_MF).double().quantile(shares).float())

    def distances(self, features_BF: Tensor) -> Tensor:
        """The distance of each sample from its nearest class, float32 (B,) on the CPU."""
        white_BF = features_BF.cpu().float() @ self.whitening_FF
        return torch.cdist(white_BF, self.means_CF @ self.whitening_FF).amin(dim=1)

    def threshold(self, share: float) -> float:
        """The distance that this fraction of the validation images exceeds."""
        place = (1 - share) * (len(self.quantiles_Q) - 1)
        low = int(place)
        high = min(low + 1, len(self.quantiles_Q) - 1)
        return float(torch.lerp(self.quantiles_Q[low], self.quantiles_Q[high], place - low))

    def save(self, path: Path) -> None:
        """Write the file. Raises EnvironmentFault."""
        tensors = {name: value.contiguous() for name, value in vars(self).items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: Path) -> "Unlike":
        """Read what `save` wrote. Raises UserError for a file that is corrupt."""
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError, OSError) as error:
            raise UserError(
                f"{path} is corrupt: delete it, and it is computed again from the training images"
            ) from error
