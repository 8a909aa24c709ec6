"""One training step, all of it on the device, so that no step waits for a number."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model.balance import BalanceConfig, losses_by_place, weighted_sum
from model.moe_vit import AnyMoE
from model.transfer import Frozen
from training.health import OUTPUT, NumberWatch


@dataclass
class StepResult:
    """What a step on B samples came to, on the device and without gradients.

    loss: mean task loss. correct: samples classified right. importance_LE: gate weight of each expert at each place,
    summed. dropped: choices without a place in an expert. auxiliary: unweighted balance losses by name, (L,).
    assignments, learned: known to the host; learned is False in random warm-up.
    """

    loss: Tensor
    correct: Tensor
    importance_LE: Tensor
    dropped: Tensor
    auxiliary: dict[str, Tensor]
    assignments: int
    learned: bool


class TrainingStep:
    """Features and labels -> gradients -> weights; learning rate, moving average and counters are the trainer's.

    A step with a number that is not finite changes no weight. On a CPU it returns None before the optimizer; on a
    GPU, without waiting, it tells the fused optimizer to do nothing, then and in all later steps (see NumberWatch).
    """

    def __init__(
        self,
        model: AnyMoE,
        optimizer: torch.optim.Optimizer,
        balance: BalanceConfig,
        label_smoothing: float,
        clip_norm: float,
        precision: str,
        frozen: Frozen | None = None,
    ):
        self.model, self.optimizer, self.balance, self.frozen = model, optimizer, balance, frozen
        self.label_smoothing, self.clip_norm = label_smoothing, clip_norm
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.half = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self.looks = self.device.type == "cpu"
        terms = [OUTPUT, "task loss", *(f"auxiliary loss {name}" for name in vars(balance)), "gradient"]
        self.numbers = NumberWatch(terms, self.device)

    def __call__(self, features: Tensor, labels_B: Tensor, warmup: bool, **options: Any) -> StepResult | None:
        """Train on one batch. None: not done, because a number is not finite (CPU only).

        options: of the model's forward pass: static=True for shapes that suit a CUDA graph, patch_dropout.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits_BC, routings = self.model(features, warmup=warmup, **options)
        auxiliary = losses_by_place(routings, self.balance)
        task_loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        (task_loss + weighted_sum(auxiliary, self.balance)).backward()
        if self.frozen:
            self.frozen.before_step()
        norm = self._clip()
        # A sum over the features, in float32, is not finite where one of them is not.
        values = {OUTPUT: features.sum(dtype=torch.float32), "task loss": task_loss, "gradient": norm}
        self.numbers.record(values | {f"auxiliary loss {name}": loss.sum() for name, loss in auxiliary.items()})
        if self.looks and self.numbers.check():
            return None
        if not self.looks:
            self.optimizer.found_inf = self.numbers.found_inf
        self.optimizer.step()
        self.model.after_step(routings)
        if self.frozen:
            self.frozen.after_step()
        return self._result(task_loss, logits_BC, labels_B, routings, auxiliary)

    @torch.no_grad()
    def _result(self, task_loss, logits_BC, labels_B, routings, auxiliary) -> StepResult:
        dropped = [routing.dropped for routing in routings if routing.dropped is not None]
        return StepResult(
            loss=task_loss.detach(),
            correct=(logits_BC.argmax(dim=-1) == labels_B).sum(),
            importance_LE=torch.stack([routing.importance_E for routing in routings]),
            dropped=sum(dropped) if dropped else torch.zeros_like(task_loss),
            auxiliary={name: loss.detach() for name, loss in auxiliary.items()},
            assignments=sum(len(routing.sample_A) for routing in routings),
            learned=routings[0].learned,
        )

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is cut to `clip_norm` where that is not 0."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.clip_norm:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm
