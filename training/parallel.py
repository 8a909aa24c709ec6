"""What several processes do about a training step: their shares of a batch, one gradient, and when they look up."""

import time
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import World
from common.errors import Interrupted
from common.signals import defer_signals
from features.bank import FeatureBank
from features.images import ImageBank
from model.distributed import Share
from storage.checkpoint import random_state, restore_random_state

LOOK_SECONDS = 0.5  # between two looks whether all is finite, each of which waits for the device
BUCKET = 2**25  # gradients that are added up at once, at least


class Shares:
    """How the processes of a world share the batches of a training.

    Rank r has the r-th part of each batch, in the order of the epoch that all have drawn alike. A batch of fewer
    samples than processes is every one's. What a router draws at random it draws for the whole batch, from `generator`,
    which goes on where the random numbers of one process would; all else, dropout first of all, each process draws
    by itself.
    """

    def __init__(self, world: World, seed: int, device: torch.device):
        self.world, self.seed, self.device = world, seed, device
        self.generator: torch.Generator | None = None
        self._known: dict[int, Share | None] = {}

    def begin(self) -> None:
        """Part the random numbers of the processes, which have built one model of one seed."""
        if self.world.several:
            self.generator = torch.Generator(self.device).manual_seed(self.seed)
            self.generator.set_state(_generator_state(self.device))
            self._draw_apart(0)

    def of(self, samples: int) -> Share | None:
        """This process's share of a batch of so many samples; None where it is alone."""
        if not self.world.several:
            return None
        if samples not in self._known:
            whole = samples < self.world.size
            sizes = (samples,) if whole else self.world.sizes(samples)
            self._known[samples] = Share(0 if whole else self.world.rank, sizes, self.generator)
        return self._known[samples]

    def batches(
        self, bank: FeatureBank | ImageBank, batch_size: int, order_N: Tensor, view: int
    ) -> Iterator[tuple[Tensor, Tensor, Share | None]]:
        """This process's (features, labels_B, share) of each training batch of an epoch, in its order."""
        if not self.world.several:
            served = bank.batches("train", batch_size, order_N, view=view)
            return ((features, labels_B, None) for features, labels_B in served)
        return chain.from_iterable(
            self._alike(bank, part, len(part[0]), view) for part in _runs(list(order_N.split(batch_size)))
        )

    def _alike(self, bank, batches: list[Tensor], samples: int, view: int) -> Iterator[tuple]:
        """Batches of one size."""
        share = self.of(samples)
        own_N = torch.cat([share.own(index_B) for index_B in batches])
        served = bank.batches("train", len(share.own(batches[0])), own_N, view=view)
        return ((features, labels_B, share) for features, labels_B in served)

    def state(self) -> dict[str, Any]:
        """The random numbers to come: what one process goes on with, and beside it what each of several does."""
        own = random_state(self.device)
        if self.generator is None:
            return own
        each = self.world.gather(own)
        common = {"cuda": [self.generator.get_state()]} if self.device.type == "cuda" else {}
        common = common or {"torch": self.generator.get_state()}
        return {**own, **common, "each": each}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on with what `state` returned, in any number of processes; of the same number bit by bit."""
        restore_random_state(state, self.device)
        if self.generator is None:
            return
        self.generator.set_state(_generator_state(self.device))
        each = state.get("each", [])
        if len(each) == self.world.size:
            restore_random_state(each[self.world.rank], self.device)
        else:
            self._draw_apart(step)

    def _draw_apart(self, step: int) -> None:
        numbers = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        torch.manual_seed(int(torch.randint(2**62, (self.world.size,), generator=numbers)[self.world.rank]))


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _runs(batches: list[Tensor]) -> Iterator[list[Tensor]]:
    """The batches in their order, those of one size that follow each other together."""
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    yield from (part for part in (full, batches[len(full) :]) if part)


class Exchange:
    """Adds up gradients, and a few numbers with them, over all processes."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters

    def __call__(self, numbers: Sequence[Tensor], share: Share) -> list[Tensor]:
        """Replace the gradients by their sums, where each process had the whole batch by their means; return those of
        `numbers`, scalars. Parameters without a gradient have none in any process."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sums: list[Tensor] = []
        for bucket in _buckets([*gradients, torch.stack([number.detach().float() for number in numbers])]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat, group=share.group)
            if not share.split:
                flat /= dist.get_world_size(share.group)
            sums += flat.split([tensor.numel() for tensor in bucket])
        if gradients:
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(sums, gradients, strict=False)])
        return list(sums[-1].unbind())


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(part.numel() for part in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
