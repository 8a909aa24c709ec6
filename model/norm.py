"""Normalisation over the training samples."""

from torch import Tensor, nn
from torch.nn import functional as F


class Standardise(nn.BatchNorm1d):
    """BatchNorm (Ioffe 2015) over (B, D) that also trains on a batch of one sample, by its running statistics."""

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.training and len(x_BD) == 1:
            return F.batch_norm(x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x_BD)
