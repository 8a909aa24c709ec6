"""The training loop: steps, epochs, validation, early stopping, checkpoints."""

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from analysis.routing import expert_load
from data.features import FeatureBank
from engine.checkpoint import load_weights, random_state, restore_random_state, save_checkpoint
from engine.metrics import balance_figures, scores
from engine.optim import OptimConfig, build_optimizer, lr_factor
from engine.predict import predict
from engine.run_folder import RunFolder
from engine.tracking import Tracker
from errors import UserError
from model.balance import BalanceConfig, balance_losses, floors, weighted_sum
from model.classifier import VisionMoE

BAR_SECONDS = 0.5  # between two looks at the running loss, each of which waits for the device


@dataclass
class TrainConfig:
    """Training: how long, in what batches, when to stop."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 1024
    """Samples a step."""
    label_smoothing: float = 0.1
    """Share of each target spread evenly over all classes (Szegedy 2016)."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is validated and kept; 0: no average."""
    patience: int = 0
    """Stop after so many epochs without a better validation macro-F1; 0: run all epochs."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the experts while training (the gate is always float32); auto: bfloat16 on a GPU."""
    seed: int = 0
    """Seed of the weights, the order of the samples, dropout and routing noise."""
    save_every: int = 5
    """Epochs between two writes of checkpoints/last.pt."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}: it must be at least 0 and below 1 (0: off)")
        if self.patience < 0:
            raise ValueError(f"train.patience is {self.patience}: it is a number of epochs, 0 for no early stopping")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}: it must be at least 0 and below 2^32")


@dataclass
class EpochSums:
    """What an epoch adds up on the device, so that no step has to wait for a number."""

    loss: Tensor
    correct: Tensor
    importance_E: Tensor
    samples: int = 0
    learned_samples: int = 0
    assignments: int = 0
    dropped: Tensor | int = 0
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> "EpochSums":
        loss, correct = torch.zeros(2, device=device)
        return cls(loss, correct, torch.zeros(num_experts, device=device))


class Trainer:
    """Trains a VisionMoE on a FeatureBank, validates it after every epoch and keeps the best and the last state.

    identity: what engine.pipeline.identity describes, stored in every checkpoint.
    """

    def __init__(
        self,
        model: VisionMoE,
        bank: FeatureBank,
        run: RunFolder,
        tracker: Tracker,
        config: TrainConfig,
        optim: OptimConfig,
        balance: BalanceConfig,
        routing_warmup_steps: int,
        identity: dict[str, Any],
    ):
        from timm.utils import ModelEmaV3  # here, because importing timm takes seconds

        self.model, self.bank, self.run, self.tracker = model, bank, run, tracker
        self.config, self.optim, self.balance = config, optim, balance
        self.routing_warmup_steps, self.identity = routing_warmup_steps, identity
        self.device = bank.device
        images = len(bank.splits.train)
        if config.batch_size > images:
            raise UserError(
                f"train.batch_size {config.batch_size} is larger than the {images} training images: lower it"
            )
        self.steps_per_epoch = math.ceil(images / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        if routing_warmup_steps >= self.total_steps:
            raise UserError(
                f"router.warmup_steps {routing_warmup_steps} routes all {self.total_steps} steps at random and never "
                "trains the gate: lower it, or raise train.epochs"
            )
        self.optimizer = build_optimizer(model, optim)
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast_dtype = torch.bfloat16 if half else None
        self.epoch, self.step = 0, 0
        self.best: dict[str, float] = {"epoch": 0, "macro_f1": -1.0}
        self.improved = 0  # the last epoch that was better than all before it, not merely as good

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that are validated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def fit(self) -> dict[str, float]:
        """Train to the last epoch or the end of patience. Returns the best epoch and its validation macro-F1."""
        while self.epoch < self.config.epochs and not self._out_of_patience():
            self.epoch += 1
            started = time.perf_counter()
            values = self._train_epoch()
            values |= self._validate()
            better = values["macro_f1/validation"] >= self.best["macro_f1"]  # of equals the later, which learned longer
            if values["macro_f1/validation"] > self.best["macro_f1"]:
                self.improved = self.epoch
            if better:
                self.best = {"epoch": self.epoch, "macro_f1": values["macro_f1/validation"]}
            values["speed/epoch_seconds"] = time.perf_counter() - started
            print(self._line(values), flush=True)
            # Before the checkpoint: a resumed run drops lines that come after its checkpoint, but cannot add one.
            self.tracker.scalars(values, step=self.step, epoch=self.epoch)
            self._save(better)
        return self.best

    def _line(self, values: dict[str, float]) -> str:
        balance = f"balance {values['balance/entropy']:.2f}" if "balance/entropy" in values else "random routing"
        star = " *" if self.best["epoch"] == self.epoch else ""
        return (
            f"epoch {self.epoch:3d}/{self.config.epochs}  loss {values['loss/train']:.3f}  "
            f"accuracy {values['accuracy/train']:.3f}  validation: loss {values['loss/validation']:.3f} "
            f"accuracy {values['accuracy/validation']:.3f} macro-F1 {values['macro_f1/validation']:.3f}  "
            f"{balance}  {values['speed/epoch_seconds']:.1f} s{star}"
        )

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.epoch - self.improved

    def _train_epoch(self) -> dict[str, float]:
        self.model.train()
        moe = self.model.moe
        usage_before_E = moe.usage_E.clone()
        sums = EpochSums.zeros(moe.router.num_experts, self.device)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order_N = torch.randperm(len(self.bank.splits.train), generator=generator)
        batches = self.bank.batches("train", self.config.batch_size, order_N, view=self.epoch - 1)
        looked = time.perf_counter()
        with self._bar() as bar:
            for features, labels_B in batches:
                self._train_step(features, labels_B, sums)
                bar.update()
                if time.perf_counter() - looked > BAR_SECONDS:
                    bar.set_postfix_str(self._running(sums))
                    looked = time.perf_counter()
            bar.set_postfix_str(self._running(sums))
        return self._epoch_values(sums, (moe.usage_E - usage_before_E).cpu().numpy())

    def _bar(self) -> tqdm:
        label = f"epoch {self.epoch}/{self.config.epochs}"
        return tqdm(total=self.steps_per_epoch, desc=label, unit="step", leave=False, disable=None)

    def _train_step(self, features: Tensor, labels_B: Tensor, sums: EpochSums) -> None:
        warmup = self.step < self.routing_warmup_steps
        self._set_learning_rate()
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits_BC, routing = self.model(features, warmup=warmup)
        auxiliary = balance_losses(routing, self.balance)
        task_loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        (task_loss + weighted_sum(auxiliary, self.balance)).backward()
        if self.optim.clip_norm:
            clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.optimizer.step()
        self.model.moe.after_step(routing)
        self.step += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
        with torch.no_grad():
            sums.samples += len(labels_B)
            sums.assignments += len(routing.sample_A)
            sums.dropped += 0 if routing.dropped is None else routing.dropped
            sums.loss += task_loss * len(labels_B)
            sums.correct += (logits_BC.argmax(dim=-1) == labels_B).sum()
            if routing.learned:
                sums.learned_samples += len(labels_B)
                sums.importance_E += routing.importance_E
                for name, loss in auxiliary.items():
                    sums.auxiliary[name] = sums.auxiliary.get(name, 0.0) + loss * len(labels_B)

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr * lr_factor(self.step, self.total_steps, self.optim)

    def _running(self, sums: EpochSums) -> str:
        """Loss, accuracy and balance so far, for the bar. Raises errors.UserError where the loss is not finite."""
        loss = float(sums.loss) / sums.samples
        if not math.isfinite(loss):
            kept = self.run.last if self.run.last.exists() else "none yet"
            raise UserError(
                f"the loss is {loss} at step {self.step} of epoch {self.epoch}: lower --optim.lr "
                f"(last good checkpoint: {kept})"
            )
        load_E = sums.importance_E.cpu().numpy()
        balance = f"balance {balance_figures(load_E)['balance/entropy']:.2f}" if load_E.sum() else "random routing"
        return f"loss {loss:.3f}, accuracy {float(sums.correct) / sums.samples:.3f}, {balance}"

    def _epoch_values(self, sums: EpochSums, usage_E) -> dict[str, float]:
        values = {
            "loss/train": float(sums.loss) / sums.samples,
            "accuracy/train": float(sums.correct) / sums.samples,
            "learning_rate/train": self.optimizer.param_groups[0]["lr"],
            "balance/drop_rate": int(sums.dropped) / (int(sums.dropped) + sums.assignments),
        }
        for name, total in sums.auxiliary.items():
            values[f"loss_auxiliary/{name}"] = float(total) / sums.learned_samples
        for name, floor in floors(self.balance, self.model.moe.router).items():
            values[f"loss_auxiliary_floor/{name}"] = floor
        if usage_E.sum():  # learned routing only: random warm-up would hide a collapsed gate
            load_E = usage_E / usage_E.sum()
            importance_E = (sums.importance_E / sums.importance_E.sum()).tolist()
            values |= {f"expert_load/expert_{e}": float(share) for e, share in enumerate(load_E)}
            values |= {f"expert_importance/expert_{e}": share for e, share in enumerate(importance_E)}
            values |= balance_figures(load_E)
        return values

    def _validate(self) -> dict[str, float]:
        predictions = predict(self.evaluated, self.bank, "validation")
        values = scores(predictions.labels_N, predictions.predicted_N, self.bank.splits.train.num_classes)
        load_E = expert_load(predictions.expert_A, self.model.moe.router.num_experts)
        loads = {f"expert_load_validation/expert_{e}": float(share) for e, share in enumerate(load_E)}
        return {"loss/validation": predictions.loss(), **{f"{key}/validation": v for key, v in values.items()}, **loads}

    def _save(self, better: bool) -> None:
        """Write best.pt where this epoch is the best so far, and last.pt when it is due."""
        if better:
            save_checkpoint(self.run.best, {"model": self.evaluated.state_dict(), **self.best, **self.identity})
        due = self.epoch == 1 or self.epoch % self.config.save_every == 0
        if due or self.epoch == self.config.epochs or self._out_of_patience():
            save_checkpoint(self.run.last, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "improved": self.improved,
            "random": random_state(self.device),
            "task_id": self.tracker.task_id,
            **self.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises errors.UserError where it does not fit this model."""
        load_weights(self.model, state["model"], self.run.last)
        if self.ema:
            load_weights(self.ema.module, state["ema"], self.run.last)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type == "cuda"  # the run may have moved to another machine
        self.epoch, self.step, self.best = state["epoch"], state["step"], dict(state["best"])
        self.improved = state["improved"]
        restore_random_state(state["random"], self.device)
