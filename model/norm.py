"""Normalisation over the training samples."""

from torch import Tensor, nn
from torch.nn import functional as F


class Standardise(nn.BatchNorm1d):
    """BatchNorm (Ioffe 2015) over (B, D) that also trains on a batch of one sample, by its running statistics.

    by_running: training updates the running statistics but uses them too, so that an output does not depend on
    the batch.
    """

    def __init__(self, num_features: int, affine: bool = True, by_running: bool = False):
        super().__init__(num_features, affine=affine)
        self.by_running = by_running

    def forward(self, x_BD: Tensor) -> Tensor:
        if not self.training or len(x_BD) > 1:
            normalised_BD = super().forward(x_BD)  # in training this updates the running statistics
            if not self.by_running:
                return normalised_BD
        return F.batch_norm(x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
