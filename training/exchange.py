"""The exchange between processes that share a batch, after the backward pass: gradients and a few numbers."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import World
from model.distributed import Share

BUCKET = 2**25  # minimum of numbers that are summed at once


class Exchange:
    """Sums the gradients of `parameters` over the processes of a world."""

    def __init__(self, parameters: Sequence[Tensor], world: World):
        self.parameters, self.world = parameters, world

    def __call__(self, share: Share, output: Tensor, loss: Tensor, correct: Tensor) -> tuple[Tensor, ...]:
        """Replace each gradient by the sum over the processes, or their mean if each had the whole batch.

        Returns the same reduction of the scalars output, loss and correct, and a tensor (P,): 2 for a process whose
        output is not finite, 1 if only its loss is not, which may come from another process's output. A parameter
        without a gradient has none in any process.
        """
        bad_P = torch.zeros(self.world.size, device=loss.device)
        bad_P[self.world.rank] = torch.where(output.isfinite(), (~loss.isfinite()).float(), 2.0)
        numbers = torch.cat([torch.stack([output, loss.detach(), correct.float()]), bad_P])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sums: list[Tensor] = []
        for bucket in _buckets([*gradients, numbers]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat, group=share.group)
            if not share.split:
                flat /= self.world.size
            sums += flat.split([tensor.numel() for tensor in bucket])
        if gradients:
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(sums, gradients, strict=False)])
        output, loss, correct, *_ = sums[-1].unbind()
        return output, loss, correct, sums[-1][3:]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(part.numel() for part in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
