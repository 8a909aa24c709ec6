"""Normalisation of features: over the training samples, or of each feature group separately."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .distributed import current_share, is_split, summed, whole_size


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
        if x_BD.is_cuda:
            return self._on_gpu(x_BD)
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

    def _on_gpu(self, x_BD: Tensor) -> Tensor:
        """The same with the fused kernels of `nn.SyncBatchNorm`: a few passes over the rows instead of a dozen."""
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
        statistics = (self.running_mean, self.running_var, self.eps, self.momentum)
        return _WholeBatchNorm.apply(x_BD.contiguous(), self.weight, self.bias, current_share(), *statistics)


class _WholeBatchNorm(torch.autograd.Function):
    """Processes exchange mean, deviation and number of their rows; in the backward pass, two sums of gradients."""

    @staticmethod
    def forward(ctx, x_BD, weight_D, bias_D, share, running_mean, running_var, eps, momentum):
        mean_D, invstd_D = torch.batch_norm_stats(x_BD, eps)
        count = mean_D.new_full((1,), len(x_BD))
        mean_PD, invstd_PD, count_P1 = share.stack(torch.cat([mean_D, invstd_D, count])).split(x_BD.shape[1], dim=1)
        count_P = count_P1.flatten()
        mean_D, invstd_D = torch.batch_norm_gather_stats_with_counts(
            x_BD, mean_PD.contiguous(), invstd_PD.contiguous(), running_mean, running_var, momentum, eps, count_P
        )
        ctx.save_for_backward(x_BD, weight_D, mean_D, invstd_D, count_P.to(torch.int32))
        ctx.share = share
        return torch.batch_norm_elemt(x_BD, weight_D, bias_D, mean_D, invstd_D, eps)

    @staticmethod
    def backward(ctx, grad_BD):
        x_BD, weight_D, mean_D, invstd_D, count_P = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        sum_D, along_D, of_weight_D, of_bias_D = torch.batch_norm_backward_reduce(
            grad_BD, x_BD, mean_D, invstd_D, weight_D, *ctx.needs_input_grad[:3]
        )
        if weight_D is None:  # the kernel returns empty tensors for gradients that are not needed
            of_weight_D = of_bias_D = None
        of_x_BD = None
        if ctx.needs_input_grad[0]:
            sum_D, along_D = ctx.share.sum(torch.stack([sum_D, along_D])).unbind()
            of_x_BD = torch.batch_norm_backward_elemt(
                grad_BD, x_BD, mean_D, invstd_D, weight_D, sum_D, along_D, count_P
            )
        return of_x_BD, of_weight_D, of_bias_D, *[None] * 5


class EachNorm(nn.Module):
    """LayerNorm (Ba 2016) without weights of each of `num_groups` equally wide features: (B, F) -> (B, F)."""

    def __init__(self, num_features: int, num_groups: int):
        super().__init__()
        self.width = num_features // num_groups

    def forward(self, x_BF: Tensor) -> Tensor:
        return F.layer_norm(x_BF.unflatten(1, (-1, self.width)), (self.width,)).flatten(1)
