"""Gathering rows for experts and back, with gradients that are copies and sums.

PyTorch's gradient of indexing adds rows atomically, which is slow and not deterministic, because an index may name a
row twice. These functions know how often each row is used, unless some choices were dropped.
"""

import torch
from torch import Tensor

from .routing import Assignments


def gather(x_BD: Tensor, sample_R: Tensor, row_A: Tensor, assignments: Assignments) -> Tensor:
    """x_BD[sample_R], (R, D). row_A: the row of each assignment; gradients of other rows are ignored."""
    return _Gather.apply(x_BD, sample_R, row_A, assignments.sample_A, assignments.top_k)


def pick(rows_RC: Tensor, row_A: Tensor) -> Tensor:
    """rows_RC[row_A], (A, C); row_A must not name a row twice."""
    return _Pick.apply(rows_RC, row_A)


def inverse(order_A: Tensor) -> Tensor:
    """The inverse of a permutation (A,), int64."""
    return torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BD: Tensor, sample_R: Tensor, row_A: Tensor, sample_A: Tensor, top_k: int | None) -> Tensor:
        ctx.save_for_backward(row_A, sample_A)
        ctx.samples, ctx.top_k = len(x_BD), top_k
        return x_BD.index_select(0, sample_R)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        row_A, sample_A = ctx.saved_tensors
        grad_AD = grad_RD.index_select(0, row_A)
        if ctx.top_k is None:
            grad_BD = grad_AD.new_zeros(ctx.samples, grad_AD.shape[1]).index_add_(0, sample_A, grad_AD)
        else:  # assignment a belongs to sample a // k
            grad_BD = grad_AD if ctx.top_k == 1 else grad_AD.unflatten(0, (ctx.samples, ctx.top_k)).sum(1)
        return grad_BD, None, None, None, None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RC: Tensor, row_A: Tensor) -> Tensor:
        ctx.save_for_backward(row_A)
        ctx.rows = len(rows_RC)
        return rows_RC.index_select(0, row_A)

    @staticmethod
    def backward(ctx, grad_AC: Tensor):
        (row_A,) = ctx.saved_tensors
        return grad_AC.new_zeros(ctx.rows, grad_AC.shape[1]).index_copy_(0, row_A, grad_AC), None
