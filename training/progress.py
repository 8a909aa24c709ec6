"""The progress of an epoch: its steps, sums and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.routing import balance_figures
from training.step import StepResult


@dataclass
class EpochSums:
    """Sums over the samples of an epoch so far; tensors on the device.

    importance_LE, auxiliary (L,) and learned_samples cover only the steps with learned routing.
    """

    loss: Tensor
    correct: Tensor
    importance_LE: Tensor
    dropped: Tensor
    samples: int = 0
    learned_samples: int = 0
    assignments: int | Tensor = 0
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, places: int, num_experts: int, device: torch.device) -> "EpochSums":
        """The sums at the start of an epoch."""
        loss, correct, dropped = torch.zeros(3, device=device)
        return cls(loss, correct, torch.zeros(places, num_experts, device=device), dropped)

    def add(self, result: StepResult, samples: int) -> None:
        """Add a step on `samples` samples."""
        self.samples += samples
        self.assignments = self.assignments + result.assignments
        self.loss += result.loss * samples
        self.correct += result.correct
        self.dropped += result.dropped
        if result.learned:
            self.learned_samples += samples
            self.importance_LE += result.importance_LE
            for name, loss in result.auxiliary.items():
                self.auxiliary[name] = self.auxiliary.get(name, 0.0) + loss * samples

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for `load_state_dict`."""
        return vars(self) | {"auxiliary": dict(self.auxiliary), "assignments": int(self.assignments)}

    def load_state_dict(self, state: dict[str, Any]) -> "EpochSums":
        """Load a state from `state_dict` in place. Raises KeyError, TypeError, RuntimeError."""
        state = {"importance_LE": state.get("importance_E")} | state  # runs of version 0.1 have one place
        for name in ("loss", "correct", "importance_LE", "dropped"):
            getattr(self, name).copy_(state[name])
        for name in ("samples", "learned_samples", "assignments"):
            setattr(self, name, int(state[name]))
        places = torch.zeros_like(self.importance_LE[:, 0])
        self.auxiliary = {name: places.clone().copy_(v) for name, v in state["auxiliary"].items()}
        return self

    def running(self, usage_LE: Tensor) -> str:
        """Loss, accuracy and balance so far; waits for the device. usage_LE: as in `values`."""
        load_E = usage_LE.sum(0).cpu().numpy()
        loss, accuracy = float(self.loss) / self.samples, float(self.correct) / self.samples
        words = [f"loss {loss:.3f}", f"accuracy {accuracy:.3f}"]
        if len(load_E) > 1:
            words.append(_balance(balance_figures(load_E) if load_E.sum() else {}))
        return ", ".join(words)

    def values(self, usage_LE: np.ndarray, floors: dict[str, float], places: Sequence[str]) -> dict[str, float]:
        """The epoch's metrics by "title/series"; with several places also those of each place.

        usage_LE: samples that the learned gate sent to each expert at each of `places`. floors: the auxiliary losses at
        perfect balance.
        """
        dropped, assignments = float(self.dropped), int(self.assignments)
        values = {
            "loss/train": float(self.loss) / self.samples,
            "accuracy/train": float(self.correct) / self.samples,
            "balance/drop_rate": dropped / (dropped + assignments),
        }
        for name, total_L in self.auxiliary.items():
            losses_L = (total_L / self.learned_samples).tolist()
            values[f"loss_auxiliary/{name}"] = sum(losses_L) / len(losses_L)
            if len(places) > 1:
                pairs = zip(places, losses_L, strict=True)
                values |= {f"loss_auxiliary_{place}/{name}": loss for place, loss in pairs}
        values |= {f"loss_auxiliary_floor/{name}": floor for name, floor in floors.items()}
        if usage_LE.sum():  # only learned routing: random warm-up would hide a collapsed gate
            importance_E = self.importance_LE.sum(0).cpu().numpy()
            values |= shares("expert_load", usage_LE.sum(axis=0)) | shares("expert_importance", importance_E)
            values |= balance_figures(usage_LE.sum(axis=0) / usage_LE.sum())
            for place, usage_E in zip(places, usage_LE, strict=True) if len(places) > 1 else ():
                values |= shares(f"expert_load_{place}", usage_E)
        return values


@dataclass
class Progress:
    """The progress of the current epoch.

    batches: steps done. usage_before_LE: the model's usage counters at its start. seconds: time spent on it by
    interrupted processes.
    """

    sums: EpochSums
    usage_before_LE: Tensor
    batches: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for `from_state`."""
        return vars(self) | {"sums": self.sums.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], zeros: EpochSums) -> "Progress":
        """The progress of a state from `state_dict`, in the tensors of `zeros`."""
        before = state["usage_before_LE"] if "usage_before_LE" in state else state["usage_before_E"]
        usage_LE = torch.zeros_like(zeros.importance_LE, dtype=torch.int64).copy_(before)
        return cls(zeros.load_state_dict(state["sums"]), usage_LE, int(state["batches"]), float(state["seconds"]))


def shares(title: str, counts_E: np.ndarray) -> dict[str, float]:
    """Each expert's share by "title/series"."""
    return {f"{title}/expert_{e}": float(share) for e, share in enumerate(counts_E / max(counts_E.sum(), 1e-30))}


def epoch_line(values: dict[str, float], epoch: int, epochs: int, best: bool) -> str:
    """The line printed at the end of an epoch; a star marks the best epoch so far. A single expert has no balance."""
    single = "expert_load/expert_0" in values and "expert_load/expert_1" not in values
    balance = "" if single else f"  {_balance(values)}"
    return (
        f"epoch {epoch:3d}/{epochs}  loss {values['loss/train']:.3f}  "
        f"accuracy {values['accuracy/train']:.3f}  validation: loss {values['loss/validation']:.3f} "
        f"accuracy {values['accuracy/validation']:.3f} macro-F1 {values['macro_f1/validation']:.3f}"
        f"{balance}  {values['speed/epoch_seconds']:.1f} s{' *' if best else ''}"
    )


def _balance(values: Mapping[str, float]) -> str:
    """The entropy of the load; without it the experts were chosen at random."""
    return f"balance {values['balance/entropy']:.2f}" if "balance/entropy" in values else "random routing"
