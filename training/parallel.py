"""Training with several processes as one: their parts of each batch, their random numbers, and when they stop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from common.distributed import World
from common.errors import Interrupted
from common.signals import defer_signals
from features.bank import FeatureBank
from features.images import ImageBank
from model.distributed import Share
from model.moe_vit import AnyMoE
from storage.checkpoint import random_state, restore_random_state

CHECK_SECONDS = 0.5  # between two checks for numbers that are not finite, each of which waits for the device


class Shares:
    """How the processes of a world share the batches of a training.

    Rank r has the r-th part of each batch, in the epoch's order, which is the same in all processes. If a batch has
    fewer samples than there are processes, every process has all of it. A router draws its random numbers for the
    whole batch from `generator`, which continues the random numbers of a single process; everything else, such as
    dropout, each process draws independently.
    """

    def __init__(self, world: World, seed: int, device: torch.device):
        self.world, self.seed, self.device = world, seed, device
        self.generator: torch.Generator | None = None
        self._known: dict[int, Share | None] = {}

        if world.several:  # all have built the same model from the same seed
            self.generator = torch.Generator(device)
            self.generator.set_state(_generator_state(device))
            self._draw_apart(0)

    def samples_here(self, samples: int) -> int:
        """The number of samples of a batch that belong to this process."""
        return samples if (share := self.of(samples)) is None else len(share.own(torch.empty(samples)))

    def static(self, model: AnyMoE) -> bool:
        """Whether a process has equally many assignments in each step: not if experts choose among all samples."""
        return not self.world.several or model.mixtures[0].router.token_choice or model.mixtures[0].router.reads_tokens

    def of(self, samples: int) -> Share | None:
        """The share of this process in a batch of this size; None for a single process."""
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
        """(features, labels_B, share) of this process for each training batch of an epoch, in order."""
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

    @contextmanager
    def random_numbers(self, share: Share | None, step: int) -> Iterator[None]:
        """Inside, processes that each have a whole batch draw the same random numbers; afterwards each uses its own
        again.
        """
        if share is None or share.split:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + step)
            yield

    def state(self) -> dict[str, Any]:
        """The states of the random number generators: that of a single process, and those of each of several."""
        own = random_state(self.device)
        if self.generator is None:
            return own
        each = self.world.gather(own)
        common = {"cuda": [self.generator.get_state()]} if self.device.type == "cuda" else {}
        common = common or {"torch": self.generator.get_state()}
        return {**own, **common, "each": each}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Continue from the result of `state`, in any number of processes; bit for bit with the same number."""
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
    """The batches in order, with consecutive batches of the same size grouped."""
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    yield from (part for part in (full, batches[len(full) :]) if part)


class Checks:
    """When training checks for signals: every half second. Several processes do so after the same step.

    There each process learns of signals to the others, so that all stop after the same step, with one checkpoint.
    """

    def __init__(self, world: World):
        self.world = world
        self._checked, self._steps, self._after = time.perf_counter(), 0, 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wrap training: at a signal all processes stop together."""
        if not self.world.several:
            yield
            return
        with defer_signals.ignoring_repeats():
            yield

    def due(self) -> bool:
        """Whether to check now, after a step. Raises Interrupted in all processes if one of several got a signal."""
        now = time.perf_counter()
        if not self.world.several:
            found = now - self._checked > CHECK_SECONDS
            self._checked = now if found else self._checked
            return found
        self._steps += 1
        if self._steps < self._after:
            return False
        pace = self._steps / max(now - self._checked, 1e-6)
        told = self.world.gather((defer_signals.pending, pace))
        if number := next((number for number, _ in told if number), 0):
            raise Interrupted(number)
        # The value of rank 0, so that all agree; at most twice as long as before, because the first steps are slow.
        self._after = max(1, min(2 * self._after, int(CHECK_SECONDS * told[0][1])))
        self._checked, self._steps = time.perf_counter(), 0
        return True
