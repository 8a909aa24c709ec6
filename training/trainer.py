"""The training loop: steps, epochs, validation, early stopping, checkpoints."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import Interrupted, UserError
from common.memory import peak_memory
from common.signals import defer_signals
from config.config import Config
from features.bank import FeatureBank
from features.images import ImageBank
from model.balance import floors
from model.moe_vit import AnyMoE
from model.transfer import Frozen
from storage.checkpoint import (
    RESUMABLE,
    fitting,
    load_checkpoint,
    load_optimizer,
    random_state,
    require_like,
    restore_random_state,
    save_checkpoint,
)
from storage.folder import RunFolder
from tracking.tracker import Tracker
from training.graph import GraphedStep, worth_capturing
from training.health import RoutingWatch, not_finite
from training.length import Pace, check_warmup, steps_per_epoch
from training.optim import build_optimizer, set_learning_rate
from training.progress import EpochSums, Progress, epoch_line
from training.step import TrainingStep

BAR_SECONDS = 0.5  # between two looks at the running loss, each of which waits for the device


class Trainer:
    """Trains a VisionMoE on a FeatureBank, or a MoEViT on an ImageBank; keeps the best and the last state.

    validate: scores the weights that are evaluated after each epoch, as evaluation.validation.validate does.
    identity: what assembly.pipeline.identity describes, stored in every checkpoint. frozen: the parts of the model that
    stay as they are. Raises UserError for a batch larger than the training set, or a routing warm-up that never ends.
    """

    def __init__(
        self,
        config: Config,
        model: AnyMoE,
        bank: FeatureBank | ImageBank,
        run: RunFolder,
        tracker: Tracker,
        identity: dict[str, Any],
        validate: Callable[[AnyMoE], Any],
        frozen: Frozen | None = None,
    ):
        from timm.utils import ModelEmaV3  # here, because importing timm takes seconds

        self.model, self.bank, self.run, self.tracker = model, bank, run, tracker
        self.config, self.optim, self.balance = config.train, config.optim, config.balance
        self.routing_warmup_steps, self.identity, self.validate = config.router.random_steps, identity, validate
        self.device = bank.device
        self.steps_per_epoch = steps_per_epoch(self.config, len(bank.splits.train))
        self.total_steps = self.steps_per_epoch * self.config.epochs
        check_warmup(self.routing_warmup_steps, self.total_steps)
        self.pace = Pace(self.config.epochs, getattr(bank, "views_used", 0))
        self.optimizer = build_optimizer(model, self.optim)
        decay, batch_size = self.config.ema_decay, self.config.batch_size
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
        captured = worth_capturing(self.config.graph, model, batch_size)
        smoothing, clip_norm, precision = self.config.label_smoothing, self.optim.clip_norm, self.config.precision
        self.frozen = frozen
        step = TrainingStep(model, self.optimizer, self.balance, smoothing, clip_norm, precision, frozen)
        self.numbers = step.numbers
        self.train_step = GraphedStep(step, batch_size) if captured else step
        self.routing = RoutingWatch(model.mixtures[0].router, self.balance, self.routing_warmup_steps)
        self.where = [f" in {place.replace('_', ' ')}" if len(model.places) > 1 else "" for place in model.places]
        self.epoch, self.step = 0, 0  # epochs begun, steps done
        self.progress: Progress | None = None  # None: the epoch is over
        self.kept_at, self.kept = (0, True), "none yet"  # (step, epoch is over) and name of the last checkpoint
        self.best: dict[str, float] = {"epoch": 0, "macro_f1": -1.0}
        self.improved = 0  # the last epoch that was better than all before it, not merely as good
        self.chosen: dict[str, Any] | None = None  # what best.pt is, or will be when the next checkpoint is due
        self.chosen_is_saved = True

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that are validated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch or the end of patience.

        Returns what best.pt holds: the weights of the epoch that is kept, its number and validation macro-F1, and the
        identity. Interrupted, which a signal raises under common.signals.stoppable, leaves a checkpoint of the last
        whole step. Raises UserError where a number is not finite, EnvironmentFault where the run
        folder is gone or cannot be written.
        """
        try:
            while self.progress or (self.epoch < self.config.epochs and not self._out_of_patience()):
                self._epoch()
        except Interrupted:
            self._keep()
            raise
        except UserError:  # a number that is not finite, in an epoch after the best
            self._keep_best()
            raise
        return self.chosen or load_checkpoint(self.run.best)  # of an epoch before this process

    def _epoch(self) -> None:
        started = time.perf_counter()
        if self.progress is None:
            self._begin_epoch()
        started -= self.progress.seconds
        try:
            before, begun = self.progress.sums.samples, time.perf_counter()
            values = self._train_epoch(self.progress)
            values["speed/images_per_second"] = (self.progress.sums.samples - before) / (time.perf_counter() - begun)
            values |= self._validate()
        except Interrupted:
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
        """Log and keep an epoch."""
        self.run.require()
        macro_f1 = values["macro_f1/validation"]
        last = self.config.keep == "last"
        better = macro_f1 >= self.best["macro_f1"] and not last  # the later of equals, which learned longer
        self.improved = self.epoch if macro_f1 > self.best["macro_f1"] else self.improved
        if better or last:
            self.best = {"epoch": self.epoch, "macro_f1": macro_f1}
        print(epoch_line(values, self.epoch, self.config.epochs, better), flush=True)
        self.pace.check(self.epoch, values["speed/epoch_seconds"])
        # Before the checkpoint: a resumed run drops lines that come after its checkpoint, but cannot add one.
        self.tracker.scalars(values, step=self.step, epoch=self.epoch)
        self.progress = None
        self._save(better or last)

    def _usage(self) -> Tensor:
        """Samples that the learned gates have sent to each expert at each place so far, int64 (L, E)."""
        return torch.stack([mixture.usage_E for mixture in self.model.mixtures])

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.epoch - self.improved

    def _train_epoch(self, progress: Progress) -> dict[str, float]:
        self.model.train()
        if self.frozen:
            self.frozen.hold()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order_N = torch.randperm(len(self.bank.splits.train), generator=generator)
        left_N = order_N[progress.batches * self.config.batch_size :]
        batches = self.bank.batches("train", self.config.batch_size, left_N, view=self.epoch - 1)
        looked = time.perf_counter()
        self.numbers.reset()
        self.first_step = self.step
        with self._bar(progress) as bar:
            for features, labels_B in batches:
                with defer_signals:
                    self._train_batch(features, labels_B, progress)
                bar.update()
                if time.perf_counter() - looked > BAR_SECONDS:
                    self._look(progress, bar)
                    looked = time.perf_counter()
            self._look(progress, bar)
        usage_LE = (self._usage() - progress.usage_before_LE).cpu().numpy()
        if progress.sums.learned_samples == progress.sums.samples:
            self._check_routing(usage_LE, "training")
        least = floors(self.balance, self.model.mixtures[0].router)
        values = progress.sums.values(usage_LE, least, self.model.places)
        return values | {"learning_rate/train": float(self.optimizer.param_groups[0]["lr"])}

    def _check_routing(self, load_LE: np.ndarray, split: str) -> None:
        for load_E, where in zip(load_LE, self.where, strict=True):
            self.routing.check(load_E, self.epoch, split, where)

    def _bar(self, progress: Progress) -> tqdm:
        label = f"epoch {self.epoch}/{self.config.epochs}"
        total, done = self.steps_per_epoch, progress.batches
        return tqdm(total=total, initial=done, desc=label, unit="step", leave=False, disable=None)

    def _train_batch(self, features: Tensor, labels_B: Tensor, progress: Progress) -> None:
        set_learning_rate(self.optimizer, self.step, self.total_steps, self.optim)
        result = self.train_step(features, labels_B, self.step < self.routing_warmup_steps, **self._forward_options())
        if result is None:
            self._require_finite()
        progress.sums.add(result, len(labels_B))
        self.step += 1
        progress.batches += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)

    def _forward_options(self) -> dict[str, Any]:
        """What this step asks of the model's forward pass, besides random routing."""
        drops = self.config.patch_dropout and self.step < (1 - self.config.all_patches) * self.total_steps
        return {"patch_dropout": self.config.patch_dropout} if drops else {}

    def _require_finite(self) -> None:
        """Raise UserError where a step of this epoch had a number that is not finite."""
        if found := self.numbers.check():
            good_steps, term = found
            raise not_finite(term, self.first_step + good_steps + 1, self.epoch, self.kept)

    def _look(self, progress: Progress, bar: tqdm) -> None:
        """Show how the epoch goes. Raises UserError where a number is not finite."""
        self._require_finite()
        bar.set_postfix_str(progress.sums.running())

    def _validate(self) -> dict[str, float]:
        validated = self.validate(self.evaluated)
        if not math.isfinite(validated.loss):
            raise not_finite("validation loss", self.step, self.epoch, self.kept)
        if self.step - self.steps_per_epoch >= self.routing_warmup_steps:
            # After an epoch of the learned gate, whose noise may have hidden what it does without.
            self._check_routing(validated.load_LE, "validation")
        return validated.values()

    def _save(self, keep: bool) -> None:
        """Take a copy of the weights where this epoch is the one to keep so far, and write what is due."""
        if keep:
            weights = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
            self.chosen, self.chosen_is_saved = {"model": weights, **self.best, **self.identity}, False
        due = self.epoch == 1 or self.epoch % self.config.save_every == 0
        if due or self.epoch == self.config.epochs or self._out_of_patience():
            self._keep()

    def _keep(self) -> None:
        """Write best.pt where it has changed, and last.pt, unless that is of this step or there is no step to keep."""
        if self.step == 0 or self.kept_at == (self.step, self.progress is None):
            return
        self._keep_best()
        self._require_finite()
        save_checkpoint(self.run.last, self.state_dict(), self.kept)
        self._kept()

    def _keep_best(self) -> None:
        if not self.chosen_is_saved:
            save_checkpoint(self.run.best, self.chosen, self.kept)
            self.chosen_is_saved = True

    @property
    def position(self) -> str:
        """How far training has come, in words."""
        return f"step {self.step}, in epoch {self.epoch}" if self.progress else f"epoch {self.epoch}"

    def _kept(self) -> None:
        self.kept_at, self.kept = (self.step, self.progress is None), f"{self.run.last} of {self.position}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "progress": self.progress and self.progress.state_dict(),
            "best": self.best,
            "improved": self.improved,
            "said": self.routing.said,
            "random": random_state(self.device),
            "threads": torch.get_num_threads(),
            "task_id": self.tracker.task_id,
            **self.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises UserError where it does not fit this model."""
        require_like(state, RESUMABLE, self.run.last)
        with fitting(self.run.last):
            self.model.load_state_dict(state["model"])
            if self.frozen:
                self.frozen.remember()
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.epoch, self.step, self.best = state["epoch"], state["step"], dict(state["best"])
            self.improved, self.routing.said = state["improved"], list(state["said"])
            stored, zeros = state.get("progress"), EpochSums.zeros(*self._usage().shape, self.device)
            self.progress = stored and Progress.from_state(stored, zeros)
            left = self.steps_per_epoch - self.progress.batches if self.progress else 0
            if not 0 <= left <= self.steps_per_epoch or self.step != self.epoch * self.steps_per_epoch - left:
                raise ValueError(f"step {self.step} is not in epoch {self.epoch}")
            restore_random_state(state["random"], self.device)
        self._kept()
