"""The state of a training: what its checkpoints hold, and how it continues from one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.distributed import world
from config.optim import OptimConfig
from model.moe_vit import AnyMoE
from model.old_gate import load_old_gates, old_gates
from model.transfer import Frozen
from storage.checkpoint import RESUMABLE, fitting, load_checkpoint, load_optimizer, require_like, save_checkpoint
from storage.folder import RunFolder
from tracking.tracker import Tracker
from training.expert_parallel import ExpertParallel
from training.graph import GraphedStep
from training.health import NumberWatch, RoutingWatch, not_finite
from training.optim import build_optimizer
from training.parallel import Shares
from training.progress import EpochSums, Progress
from training.step import TrainingStep


class TrainerState:
    """The state of a Trainer at each step, and its checkpoints."""

    model: AnyMoE
    ema: Any
    optimizer: torch.optim.Optimizer
    optim: OptimConfig
    train_step: TrainingStep | GraphedStep
    numbers: NumberWatch
    routing: RoutingWatch
    shares: Shares
    experts: ExpertParallel | None
    frozen: Frozen | None
    run: RunFolder
    tracker: Tracker
    identity: dict[str, Any]
    device: torch.device
    steps_per_epoch: int
    first_step: int
    epoch: int
    step: int
    progress: Progress | None
    saved_at: tuple[int, bool]
    last_saved: str
    best: dict[str, float]
    improved: int
    chosen: dict[str, Any] | None
    chosen_is_written: bool

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that are validated and saved: the moving average, if there is one."""
        return self.ema.module if self.ema else self.model

    def _usage(self) -> Tensor:
        """Samples that learned routing has sent to each expert at each place so far, int64 (L, E)."""
        return torch.stack([mixture.usage_E for mixture in self.model.mixtures])

    def _require_finite(self) -> None:
        """Raise UserError if a step of this epoch had a number that is not finite."""
        if found := self.numbers.check():
            good_steps, term = found
            at = (self.first_step + good_steps + 1, self.epoch, self.last_saved)
            raise not_finite(term, *at, self.numbers.where())

    def _write_checkpoints(self) -> None:
        """Write best.pt if it has changed, and last.pt unless it already has this step."""
        if self.step == 0 or self.saved_at == (self.step, self.progress is None):
            return
        self._write_best()
        self._require_finite()
        state = self.state_dict()
        if world().first:
            save_checkpoint(self.run.last, state, self.last_saved)
        self._mark_saved(self.run.last)

    def _write_best(self) -> None:
        if self.chosen_is_written:
            return
        best = {**self.chosen, "model": self._whole(self.chosen["model"])}
        if world().first:
            save_checkpoint(self.run.best, best, self.last_saved)
        self.chosen_is_written = True

    @property
    def _models(self) -> list[torch.nn.Module]:
        """Everything that has weights."""
        return [self.model, *([self.ema.module] if self.ema else [])]

    def _whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the model as in a single process, on rank 0."""
        return self.experts.spread.whole(state) if self.experts else state

    def _own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of a single-process model state that belongs to this process."""
        return self.experts.spread.local(state) if self.experts else state

    @property
    def position(self) -> str:
        """The progress of the training, in words."""
        return f"step {self.step}, in epoch {self.epoch}" if self.progress else f"epoch {self.epoch}"

    def _mark_saved(self, path: Path) -> None:
        self.saved_at, self.last_saved = (self.step, self.progress is None), f"{path} of {self.position}"

    def kept(self) -> dict[str, Any]:
        """The content of best.pt, after the last step."""
        best = self.chosen or load_checkpoint(self.run.best)  # best epoch of an earlier process
        return best if self.experts is None else self._assembled(best, self.experts)

    def _assembled(self, best: dict[str, Any], experts: ExpertParallel) -> dict[str, Any]:
        """The content of best.pt; the model gets all experts in every process, for its evaluation."""
        self.optimizer.state.clear()  # makes room
        self.ema = None
        if self.chosen is not None:
            best = {**best, "model": experts.spread.whole(best["model"], everywhere=True)}
        experts.spread.assemble(self.model, best["model"])
        return best

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load other weights before the first step."""
        for model in (self.model, self.evaluated):
            model.load_state_dict(self._own(weights))

    def state_dict(self) -> dict[str, Any]:
        """The full training state."""
        several = self.experts
        optimizer = several.optimizer_state(self.optimizer, self.model) if several else self.optimizer.state_dict()
        return {
            "model": self._whole(self.model.state_dict()),
            "ema": self._whole(self.ema.module.state_dict()) if self.ema else None,
            "old_gates": old_gates(self.model),
            "optimizer": optimizer,
            "placement": several.spread.shares if several else None,
            "epoch": self.epoch,
            "step": self.step,
            "progress": self.progress and self.progress.state_dict(),
            "best": self.best,
            "improved": self.improved,
            "warned": self.routing.warned,
            "random": self.shares.state(),
            "threads": torch.get_num_threads(),
            "task_id": self.tracker.task_id,
            **self.identity,
        }

    def load_state_dict(self, state: dict[str, Any], source: Path) -> None:
        """Continue from a state of `state_dict`. source: its file, for messages.

        Raises UserError if it does not fit this model.
        """
        require_like(state, RESUMABLE, source)
        with fitting(source):
            optimizer = state["optimizer"]
            if self.experts:
                if self.experts.start_from(state.get("placement"), self._models):
                    self.optimizer = build_optimizer(self.model, self.optim)
                    self.train_step.use(self.optimizer)
                optimizer = self.experts.local_optimizer_state(optimizer, self.optimizer, self.model)
            self.model.load_state_dict(self._own(state["model"]))
            load_old_gates(self.model, state.get("old_gates", {}))
            if self.frozen:
                self.frozen.remember()
            if self.ema:
                self.ema.module.load_state_dict(self._own(state["ema"]))
            load_optimizer(self.optimizer, optimizer)
            self.epoch, self.step, self.best = state["epoch"], state["step"], dict(state["best"])
            self.improved, self.routing.warned = state["improved"], list(state["warned"])
            stored, zeros = state.get("progress"), EpochSums.zeros(*self._usage().shape, self.device)
            self.progress = stored and Progress.from_state(stored, zeros)
            left = self.steps_per_epoch - self.progress.batches if self.progress else 0
            if not 0 <= left <= self.steps_per_epoch or self.step != self.epoch * self.steps_per_epoch - left:
                raise ValueError(f"step {self.step} is not in epoch {self.epoch}")
            self.shares.load_state(state["random"], self.step)
        self._mark_saved(source)
