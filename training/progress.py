"""How far an epoch has come, what it has added up, and what that says."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.routing import balance_figures
from training.step import StepResult


@dataclass
class EpochSums:
    """Sums over the samples of an epoch so far; the tensors are on the device.

    importance_E, auxiliary and learned_samples are of the steps that the learned gate routed.
    """

    loss: Tensor
    correct: Tensor
    importance_E: Tensor
    dropped: Tensor
    samples: int = 0
    learned_samples: int = 0
    assignments: int = 0
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> "EpochSums":
        """The sums of an epoch that has not begun."""
        loss, correct, dropped = torch.zeros(3, device=device)
        return cls(loss, correct, torch.zeros(num_experts, device=device), dropped)

    def add(self, result: StepResult, samples: int) -> None:
        """Add a step on so many samples."""
        self.samples += samples
        self.assignments += result.assignments
        self.loss += result.loss * samples
        self.correct += result.correct
        self.dropped += result.dropped
        if result.learned:
            self.learned_samples += samples
            self.importance_E += result.importance_E
            for name, loss in result.auxiliary.items():
                self.auxiliary[name] = self.auxiliary.get(name, 0.0) + loss * samples

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `load_state_dict` takes back."""
        return vars(self) | {"auxiliary": dict(self.auxiliary)}

    def load_state_dict(self, state: dict[str, Any]) -> "EpochSums":
        """Take over what `state_dict` returned; shapes and device stay. Raises KeyError, TypeError, RuntimeError."""
        for name in ("loss", "correct", "importance_E", "dropped"):
            getattr(self, name).copy_(state[name])
        for name in ("samples", "learned_samples", "assignments"):
            setattr(self, name, int(state[name]))
        self.auxiliary = {name: torch.zeros_like(self.loss).copy_(v) for name, v in state["auxiliary"].items()}
        return self

    def running(self) -> str:
        """Loss, accuracy and balance so far, for the bar; waits for the device."""
        load_E = self.importance_E.cpu().numpy()
        balance = f"balance {balance_figures(load_E)['balance/entropy']:.2f}" if load_E.sum() else "random routing"
        loss, accuracy = float(self.loss) / self.samples, float(self.correct) / self.samples
        return f"loss {loss:.3f}, accuracy {accuracy:.3f}, {balance}"

    def values(self, usage_E: np.ndarray, floors: dict[str, float]) -> dict[str, float]:
        """The epoch's numbers by "title/series".

        usage_E: samples that the learned gate sent to each expert. floors: the auxiliary losses at perfect balance.
        """
        dropped = float(self.dropped)
        values = {
            "loss/train": float(self.loss) / self.samples,
            "accuracy/train": float(self.correct) / self.samples,
            "balance/drop_rate": dropped / (dropped + self.assignments),
        }
        for name, total in self.auxiliary.items():
            values[f"loss_auxiliary/{name}"] = float(total) / self.learned_samples
        values |= {f"loss_auxiliary_floor/{name}": floor for name, floor in floors.items()}
        if usage_E.sum():  # learned routing only: random warm-up would hide a collapsed gate
            load_E = usage_E / usage_E.sum()
            importance_E = (self.importance_E / self.importance_E.sum()).tolist()
            values |= {f"expert_load/expert_{e}": float(share) for e, share in enumerate(load_E)}
            values |= {f"expert_importance/expert_{e}": share for e, share in enumerate(importance_E)}
            values |= balance_figures(load_E)
        return values


@dataclass
class Progress:
    """How far the current epoch has come.

    batches: steps done. usage_before_E: the model's usage counters when the epoch began. seconds: spent on it by
    processes that were interrupted.
    """

    sums: EpochSums
    usage_before_E: Tensor
    batches: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state` takes back."""
        return vars(self) | {"sums": self.sums.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], zeros: EpochSums) -> "Progress":
        """The progress that `state_dict` described, in the tensors of `zeros`."""
        usage_E = torch.zeros_like(zeros.importance_E, dtype=torch.int64).copy_(state["usage_before_E"])
        return cls(zeros.load_state_dict(state["sums"]), usage_E, int(state["batches"]), float(state["seconds"]))


def epoch_line(values: dict[str, float], epoch: int, epochs: int, best: bool) -> str:
    """The line that is printed at the end of an epoch; a star marks the best so far."""
    balance = f"balance {values['balance/entropy']:.2f}" if "balance/entropy" in values else "random routing"
    return (
        f"epoch {epoch:3d}/{epochs}  loss {values['loss/train']:.3f}  "
        f"accuracy {values['accuracy/train']:.3f}  validation: loss {values['loss/validation']:.3f} "
        f"accuracy {values['accuracy/validation']:.3f} macro-F1 {values['macro_f1/validation']:.3f}  "
        f"{balance}  {values['speed/epoch_seconds']:.1f} s{' *' if best else ''}"
    )
