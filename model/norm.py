"""Normalisation of features: over the training samples, or of each feature group separately."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .distributed import is_split, summed, whole_size


class Standardise(nn.BatchNorm1d):
    """BatchNorm (Ioffe 2015) over (B, D) that also trains on a batch of one sample, using its running statistics.

    by_running: training also normalises with the running statistics, so that an output does not depend on the batch.
    A batch shared by several processes is normalised as a whole.
    """

    def __init__(self, num_features: int, affine: bool = True, by_running: bool = False):
        super().__init__(num_features, affine=affine)
        self.by_running = by_running

    def forward(self, x_BD: Tensor) -> Tensor:
        if not self.training or whole_size(len(x_BD)) > 1:
            # In training both variants update the running statistics.
            whole = self.training and is_split()
            normalised_BD = self._by_whole_batch(x_BD) if whole else super().forward(x_BD)
            if not self.by_running:
                return normalised_BD
        return F.batch_norm(x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _by_whole_batch(self, x_BD: Tensor) -> Tensor:
        """`nn.BatchNorm1d.forward` with the mean and the variance of the rows of all processes."""
        count = whole_size(len(x_BD))
        mean_D = summed(x_BD.sum(dim=0)) / count
        centred_BD = x_BD - mean_D
        var_D = summed(centred_BD.square().sum(dim=0)) / count
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_D, self.momentum)
            self.running_var.lerp_(var_D * count / (count - 1), self.momentum)
        normalised_BD = centred_BD * (var_D + self.eps).rsqrt()
        return torch.addcmul(self.bias, normalised_BD, self.weight) if self.affine else normalised_BD


class EachNorm(nn.Module):
    """LayerNorm (Ba 2016) without weights of each of `num_groups` equally wide features: (B, F) -> (B, F)."""

    def __init__(self, num_features: int, num_groups: int):
        super().__init__()
        self.width = num_features // num_groups

    def forward(self, x_BF: Tensor) -> Tensor:
        return F.layer_norm(x_BF.unflatten(1, (-1, self.width)), (self.width,)).flatten(1)
