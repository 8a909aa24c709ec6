"""Normalisation of features: over the training samples, or of each feature group separately."""

from torch import Tensor, nn
from torch.nn import functional as F


class Standardise(nn.BatchNorm1d):
    """BatchNorm (Ioffe 2015) over (B, D) that also trains on a batch of one sample, by its running statistics.

    by_running: training also normalises by the running statistics, so that an output does not depend on the batch.
    """

    def __init__(self, num_features: int, affine: bool = True, by_running: bool = False):
        super().__init__(num_features, affine=affine)
        self.by_running = by_running

    def forward(self, x_BD: Tensor) -> Tensor:
        if not self.training or len(x_BD) > 1:
            normalised_BD = super().forward(x_BD)  # updates the running statistics in training
            if not self.by_running:
                return normalised_BD
        return F.batch_norm(x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class EachNorm(nn.Module):
    """LayerNorm (Ba 2016) without weights of each of `num_groups` equally wide features: (B, F) -> (B, F)."""

    def __init__(self, num_features: int, num_groups: int):
        super().__init__()
        self.width = num_features // num_groups

    def forward(self, x_BF: Tensor) -> Tensor:
        return F.layer_norm(x_BF.unflatten(1, (-1, self.width)), (self.width,)).flatten(1)
