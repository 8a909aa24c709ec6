"""Random numbers of each of several runs in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from storage.checkpoint import random_state, restore_random_state

HOST = torch.device("cpu")


class RandomNumbers:
    """The random numbers of a run that takes turns with others: in its turns it draws what it would draw alone.

    They continue the numbers of this process at the time of construction. On a GPU they have a separate generator
    state, which a CUDA graph must register.
    """

    def __init__(self, device: torch.device):
        self._host = random_state(HOST)
        self._default = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        self.generator: torch.Generator | None = self._default.clone_state() if self._default else None

    @contextmanager
    def of_steps(self) -> Iterator[None]:
        """A turn that draws on the device only, as steps do: on a GPU without the cost of the other generators."""
        if self._default is None:
            with self.all():
                yield
            return
        before = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(self.generator)
        try:
            yield
        finally:
            self._default.graphsafe_set_state(before)

    @contextmanager
    def all(self) -> Iterator[None]:
        """A turn that may draw anywhere, or store the states of all generators."""
        before = random_state(HOST)
        restore_random_state(self._host, HOST)
        try:
            if self._default is None:
                yield
            else:
                with self.of_steps():
                    yield
        finally:
            self._host = random_state(HOST)
            restore_random_state(before, HOST)
