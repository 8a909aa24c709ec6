"""The training loop: steps, epochs, validation, early stopping, checkpoints."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.distributed import world
from common.errors import Interrupted, UserError
from common.memory import peak_memory
from common.meter import Meter, meter
from common.signals import defer_signals
from config.config import Config
from features.bank import FeatureBank
from features.images import ImageBank
from model.balance import floors
from model.distributed import Share
from model.moe_vit import AnyMoE
from model.spread import Shares as ExpertShares
from model.transfer import Frozen
from storage.folder import RunFolder
from tracking.tracker import Tracker
from training.expert_parallel import ExpertParallel, moved_line
from training.graph import GraphedStep, worth_capturing
from training.health import RoutingWatch, not_finite
from training.length import Pace, check_warmup, steps_per_epoch
from training.optim import build_optimizer, set_learning_rate
from training.parallel import Checks, Shares
from training.progress import EpochSums, Progress, epoch_line
from training.state import TrainerState
from training.step import Batch, TrainingStep
from training.teacher import Teacher


class Trainer(TrainerState):
    """Trains a VisionMoE on a FeatureBank, or a MoEViT on an ImageBank; saves the best and the last state.

    validate: scores weights after each epoch, as evaluation.validation.validate does. identity: dict from
    assembly.pipeline.identity, stored in every checkpoint. frozen: the parts of the model that do not change.
    teacher: trained models to distil from. experts: for a model whose experts are on several processes. It has no
    folder yet: call `record_in` before training. Raises UserError for a batch larger than the training set, or a
    routing warm-up as long as the training.
    """

    def __init__(
        self,
        config: Config,
        model: AnyMoE,
        bank: FeatureBank | ImageBank,
        identity: dict[str, Any],
        validate: Callable[[AnyMoE], Any],
        frozen: Frozen | None = None,
        teacher: Teacher | None = None,
        experts: ExpertParallel | None = None,
    ):
        from timm.utils import ModelEmaV3  # here, because importing timm takes seconds

        self.model, self.bank = model, bank
        self.config, self.optim, self.balance = config.train, config.optim, config.balance
        self.routing_warmup_steps, self.identity, self.validate = config.random_steps, identity, validate
        self.device = bank.device
        self.steps_per_epoch = steps_per_epoch(self.config, len(bank.splits.train))
        self.total_steps = self.steps_per_epoch * self.config.epochs
        check_warmup(self.routing_warmup_steps, self.total_steps)
        self.pace = Pace(self.config.epochs, getattr(bank, "views_used", 0))
        self.optimizer = build_optimizer(model, self.optim)
        self.shares, self.checks = Shares(world(), self.config.seed, self.device), Checks(world())
        decay, batch_size = self.config.ema_decay, self.shares.samples_here(self.config.batch_size)
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
        captured = worth_capturing(self.config.graph, model, batch_size) and self.shares.static(model) and not teacher
        smoothing, clip_norm, precision = self.config.label_smoothing, self.optim.clip_norm, self.config.precision
        self.frozen, self.experts = frozen, experts
        step = TrainingStep(
            model, self.optimizer, self.balance, smoothing, clip_norm, precision, frozen, teacher, experts
        )
        self.numbers = step.numbers
        self.train_step = GraphedStep(step, batch_size, self.shares.generator) if captured else step
        self.routing = RoutingWatch(model.mixtures[0].router, self.balance, config.router.random_steps)
        self.where = [f" in {place.replace('_', ' ')}" if len(model.places) > 1 else "" for place in model.places]
        self.label, self.shown = "", True  # its name among runs that train at once, and whether to show its progress
        self.epoch, self.step = 0, 0  # epochs started, steps done
        self.progress: Progress | None = None  # None: the epoch is over
        self.saved_at, self.last_saved = (0, True), "none yet"  # (step, epoch is over) and name of the last checkpoint
        self.best: dict[str, float] = {"epoch": 0, "macro_f1": -1.0}
        self.improved = 0  # the last epoch that was strictly better than all earlier ones
        self.chosen: dict[str, Any] | None = None  # content of best.pt, now or at the next checkpoint
        self.chosen_is_written = True

    def record_in(self, run: RunFolder, tracker: Tracker) -> None:
        """Write checkpoints to a run folder and numbers to a tracker."""
        self.run, self.tracker = run, tracker

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, or until early stopping.

        Returns the content of best.pt: weights, epoch and validation macro-F1 of the best (or last) epoch, and the
        identity. When a signal raises Interrupted (see common.signals), a checkpoint of the last complete step is
        written. Raises UserError if a number is not finite, EnvironmentFault if the run folder was removed or cannot be
        written.
        """
        for _ in self.steps():
            pass
        return self.kept()

    def steps(self) -> Generator[Batch, None, None]:
        """Train as `fit`, but stop before each step and yield its batch, so that several runs can take turns.

        A run that is closed there writes a checkpoint of the last complete step.
        """
        try:
            with self.checks.together():
                while self.progress or (self.epoch < self.config.epochs and not self._out_of_patience()):
                    yield from self._epoch()
        except (Interrupted, GeneratorExit):
            self._write_checkpoints()
            raise
        except UserError:  # a number that is not finite, in an epoch after the best
            self._write_best()
            raise
        finally:
            self.release_graphs()

    def release_graphs(self) -> None:
        """Let go of captured steps: until then processes could not leave each other."""
        if isinstance(self.train_step, GraphedStep):
            self.train_step.captured.release()

    def adopt(self, weights: dict[str, Tensor], validated: Any) -> dict[str, Any]:
        """Load other weights as those of the last epoch, and write both checkpoints to resume from.

        validated: the result of `validate` for them. Returns the content of best.pt, as `fit` does.
        """
        self.start_from(weights)
        values = validated.values()
        self.epoch = self.improved = self.config.epochs
        self.step = self.total_steps
        self.best = {"epoch": self.epoch, "macro_f1": values["macro_f1/validation"]}
        if not any(line["epoch"] == self.epoch for line in self.run.history()):
            self.tracker.scalars(values, step=self.step, epoch=self.epoch)
        self._keep_weights(keep=True)
        assert self.chosen is not None
        return self.chosen

    def _epoch(self) -> Iterator[Batch]:
        started = time.perf_counter()
        if self.progress is None:
            self._begin_epoch()
        started -= self.progress.seconds
        try:
            before, begun = self.progress.sums.samples, time.perf_counter()
            values = yield from self._train_epoch(self.progress)
            values["speed/images_per_second"] = (self.progress.sums.samples - before) / (time.perf_counter() - begun)
            values |= self._validate()
        except (Interrupted, GeneratorExit):
            self.progress.seconds = time.perf_counter() - started
            raise
        values["speed/epoch_seconds"] = time.perf_counter() - started
        if (peak := peak_memory(self.device)) is not None:
            values["speed/peak_memory_gib"] = peak / 2**30
        with defer_signals:
            self._end_epoch(values)

    def _begin_epoch(self) -> None:
        with defer_signals:
            self.epoch += 1
            usage_LE = self._usage()
            self.progress = Progress(EpochSums.zeros(*usage_LE.shape, self.device), usage_LE)

    def _end_epoch(self, values: dict[str, float]) -> None:
        """Log and save an epoch."""
        if world().first:
            self.run.require()
        macro_f1 = values["macro_f1/validation"]
        last = self.config.keep == "last"
        better = macro_f1 >= self.best["macro_f1"] and not last  # in a tie the later epoch, which trained longer
        self.improved = self.epoch if macro_f1 > self.best["macro_f1"] else self.improved
        if better or last:
            self.best = {"epoch": self.epoch, "macro_f1": macro_f1}
        shares = None
        if self.experts:
            shares, numbers = self.experts.solved((self._usage() - self.progress.usage_before_LE).cpu().numpy())
            values |= numbers
        print(
            self.label and f"{self.label}  ",
            epoch_line(values, self.epoch, self.config.epochs, better),
            sep="",
            flush=True,
        )
        self.pace.check(self.epoch, values["speed/epoch_seconds"])
        # Before the checkpoint: a resumed run drops lines that come after its checkpoint, but cannot add one.
        self.tracker.scalars(values, step=self.step, epoch=self.epoch)
        self.progress = None
        if shares is not None:
            self._move(shares, values)
        self._keep_weights(better or last)

    def _move(self, shares: ExpertShares, values: dict[str, float]) -> None:
        """Move the experts to the processes of the new placement."""
        print(moved_line(values), flush=True)
        if self.chosen is not None:
            self.chosen["model"] = self.experts.spread.moved(self.chosen["model"], shares)
        self.optimizer = self.experts.move(shares, self._models, self.optimizer)
        self.train_step.use(self.optimizer)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.epoch - self.improved

    def _train_epoch(self, progress: Progress) -> Generator[Batch, None, dict[str, float]]:
        self.model.train()
        if self.frozen:
            self.frozen.hold()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order_N = torch.randperm(len(self.bank.splits.train), generator=generator)
        remaining_N = order_N[progress.batches * self.config.batch_size :]
        batches = self.shares.batches(self.bank, self.config.batch_size, remaining_N, view=self.epoch - 1)
        self.numbers.reset()
        self.first_step = self.step
        with self._meter(progress) as done:
            for features, labels_B, share in batches:
                with defer_signals, self.shares.random_numbers(share, self.step):
                    set_learning_rate(self.optimizer, self.step, self.total_steps, self.optim)
                    batch = self._batch(features, labels_B, share)
                    yield batch
                    self._train_batch(batch, share, progress)
                if self.checks.due():
                    self._require_finite()
                    running = progress.sums.running(self._usage() - progress.usage_before_LE)
                    done.note = lambda running=running: running
                done(len(labels_B) if share is None else share.total)
        world().wait()  # or a device that waits for a process that hangs would block this one without a time limit
        self._require_finite()
        usage_LE = (self._usage() - progress.usage_before_LE).cpu().numpy()
        if progress.sums.learned_samples == progress.sums.samples:
            self._check_routing(usage_LE, "training")
        least = floors(self.balance, self.model.mixtures[0].router)
        values = progress.sums.values(usage_LE, least, self.model.places)
        return values | {"learning_rate/train": float(self.optimizer.param_groups[0]["lr"])}

    def _check_routing(self, load_LE: np.ndarray, split: str) -> None:
        seed = self.label and f" with {self.label}"
        for load_E, where in zip(load_LE, self.where, strict=True):
            self.routing.check(load_E, self.epoch, split, where + seed)

    def _meter(self, progress: Progress) -> AbstractContextManager[Meter]:
        images, epochs = len(self.bank.splits.train), self.config.epochs
        later = (epochs - self.epoch) * images
        label = f"{self.label and f'{self.label}, '}epoch {self.epoch}/{epochs}"
        return meter(label, images, progress.sums.samples, later=later, shown=self.shown)

    def _train_batch(self, batch: Batch, share: Share | None, progress: Progress) -> None:
        result = self.train_step(batch.features, batch.labels_B, batch.warmup, **batch.options)
        if result is None:
            self._require_finite()
        progress.sums.add(result, len(batch.labels_B) if share is None else share.total)
        self.step += 1
        progress.batches += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
            for averaged, trained in zip(self.ema.module.mixtures, self.model.mixtures, strict=True):
                averaged.router.open_like(trained.router)

    def _batch(self, features: Tensor, labels_B: Tensor, share: Share | None) -> Batch:
        """The arguments of the next step."""
        options = self._forward_options() | ({} if share is None else {"share": share})
        return Batch(features, labels_B, self.step < self.routing_warmup_steps, options)

    def _forward_options(self) -> dict[str, Any]:
        """Options of this step's forward pass, besides random routing."""
        drops = self.config.patch_dropout and self.step < (1 - self.config.all_patches) * self.total_steps
        return {"patch_dropout": self.config.patch_dropout} if drops else {}

    def _validate(self) -> dict[str, float]:
        validated = self.validate(self.evaluated)
        if not math.isfinite(validated.loss):
            raise not_finite("validation loss", self.step, self.epoch, self.last_saved)
        few = len(self.bank.splits.validation) < 5 * self.model.mixtures[0].router.num_experts  # no reliable shares
        if not few and self.step - self.steps_per_epoch >= self.routing_warmup_steps:
            # After an epoch of learned routing; its noise may hide what the gate does without noise.
            self._check_routing(validated.load_LE, "validation")
        return validated.values()

    def _keep_weights(self, keep: bool) -> None:
        """Copy the weights if this epoch is the best so far, and write checkpoints when they are due."""
        if keep:
            weights = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
            self.chosen, self.chosen_is_written = {"model": weights, **self.best, **self.identity}, False
        due = self.epoch == 1 or self.epoch % self.config.save_every == 0
        if due or self.epoch == self.config.epochs or self._out_of_patience():
            self._write_checkpoints()
