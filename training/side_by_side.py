"""Several runs of one recipe at once: in lockstep, with their captured steps as branches of one CUDA graph."""

from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from common.signals import defer_signals
from training.graph import GraphedStep, JointStep
from training.random_numbers import RandomNumbers
from training.step import Batch
from training.trainer import Trainer


class _IncompleteStep(Exception):
    """Ends a training without a checkpoint."""


class Run:
    """A training that takes turns with others. Create it when its trainer is ready, before that of the next run.

    Each run has a separate folder, model, optimizer, moving average and random numbers, so it is as it would be alone.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.numbers = trainer, RandomNumbers(trainer.device)
        self.batch: Batch | None = None  # that of the next step; None before the first, and after the last
        self._steps = trainer.steps()

    def advance(self, alone: bool) -> bool:
        """Train on the batch, if there is one, and go on to the next; False if the training has ended.

        alone: no other run still trains, so that a signal ends this one within the call, with a checkpoint.
        """
        with self.numbers.all() if alone or self._saves() else self.numbers.of_steps():
            self.batch = next(self._steps, None)
        return self.batch is not None

    def close(self, complete: bool = True) -> None:
        """End the training; if it has not ended yet, with a checkpoint of the last complete step.

        complete: False after a joint step that failed. The weights may then be those of the next step, so nothing is
        written, and the last checkpoint stays.
        """
        if not complete:
            with suppress(_IncompleteStep):
                self._steps.throw(_IncompleteStep)
            return
        step = self.trainer.train_step
        with self.numbers.all(), closing(self._steps):
            if isinstance(step, GraphedStep) and step.ready is not None:  # a joint step has changed the weights
                next(self._steps, None)

    def _saves(self) -> bool:
        """Whether the next step is the last of its epoch, or the first of the training."""
        progress = self.trainer.progress
        return progress is None or progress.batches + 1 >= self.trainer.steps_per_epoch


def fit(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Train all runs to their ends, one step of each at a time: what `Trainer.fit` returns, for each.

    If a run fails, or a signal ends the program, the others write a checkpoint of their last complete step. Raises as
    `Trainer.fit`. After an error of a joint step, such as too little memory, each keeps its last checkpoint.
    """
    if len(runs) == 1:
        return [runs[0].trainer.fit()]
    steps = [run.trainer.train_step for run in runs if isinstance(run.trainer.train_step, GraphedStep)]
    with ExitStack() as ended:
        joint = None
        if len(steps) == len(runs):
            joint = JointStep(steps, [run.numbers for run in runs])
            ended.callback(joint.captured.release)
        for run in runs:
            run.trainer.label, run.trainer.shown = f"seed {run.trainer.config.seed}", False
            ended.callback(lambda run=run: run.close(complete=joint is None or joint.complete))
        active = list(runs)
        while active:
            active[0].trainer.shown = True
            if joint:
                joint([run.batch for run in runs])
            active = [run for run in active if run.advance(alone=len(active) == 1)]
            defer_signals.raise_pending()
    return [run.trainer.kept() for run in runs]
