"""One training step, computed entirely on the device, so that no step waits for a number."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.distributed import world
from model.balance import BalanceConfig, losses_by_place, weighted_sum
from model.distributed import Share, sharing
from model.moe_vit import AnyMoE
from model.routers import Routing
from model.transfer import Frozen
from model.whole_batch import whole_batch
from training.exchange import Exchange
from training.expert_parallel import ExpertParallel
from training.health import OUTPUT, NumberWatch
from training.teacher import Teacher


class Batch(NamedTuple):
    """The arguments of a TrainingStep: features and labels_B on the device, random routing or not, and options."""

    features: Tensor
    labels_B: Tensor
    warmup: bool
    options: dict[str, Any]


@dataclass
class StepResult:
    """The results of a step on B samples, on the device and without gradients.

    loss: mean task loss. correct: number of samples classified correctly. importance_LE: gate weight of each expert at
    each place, summed. dropped: choices without a slot in an expert. auxiliary: unweighted balance losses by name,
    (L,). assignments, learned: known to the host; learned is False during random warm-up. If several processes share a
    batch, all values are those of the whole batch, equal in every process, and assignments are on the device.
    """

    loss: Tensor
    correct: Tensor
    importance_LE: Tensor
    dropped: Tensor
    auxiliary: dict[str, Tensor]
    assignments: int | Tensor
    learned: bool


class TrainingStep:
    """Features and labels -> gradients -> weights. The trainer handles learning rate, moving average and counters.

    A step with a number that is not finite changes no weight. On a CPU it returns None before the optimizer; on a
    GPU, without waiting, it makes the fused optimizer skip this and all later updates (see NumberWatch).
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
        teacher: Teacher | None = None,
        experts: ExpertParallel | None = None,
    ):
        self.model, self.balance, self.frozen, self.teacher, self.experts = model, balance, frozen, teacher, experts
        self.label_smoothing, self.clip_norm = label_smoothing, clip_norm
        self.use(optimizer)
        self.device = self.parameters[0].device
        self.half = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self.checks_each_step = self.device.type == "cpu"
        terms = [OUTPUT, "task loss", *(f"auxiliary loss {name}" for name in vars(balance)), "gradient"]
        self.numbers = NumberWatch(terms, self.device, world().size)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Train the model's current parameters with this optimizer."""
        self.optimizer, self.parameters, self.of_experts = optimizer, list(self.model.parameters()), []
        if self.experts:  # not all of them are on this process
            self.parameters, self.of_experts = self.experts.split(self.model, optimizer)
        self.exchange = Exchange(self.parameters, world())

    def __call__(
        self, features: Tensor, labels_B: Tensor, warmup: bool, share: Share | None = None, **options: Any
    ) -> StepResult | None:
        """Train on one batch. Returns None if the step was skipped because a number is not finite (CPU only).

        share: the part of a batch shared by several processes (None: the samples are the whole batch). options: of the
        model's forward pass, static=True for shapes that suit a CUDA graph, or patch_dropout.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half), sharing(share):
            logits_BC, routings = self.model(features, warmup=warmup, **options)
        if share is not None:
            routings = self._of_whole_batch(routings, share)
        auxiliary = losses_by_place(routings, self.balance)
        task_loss = self._task_loss(features, logits_BC, labels_B)
        task_loss = task_loss if share is None else task_loss * share.part  # so that the sum over processes is the mean
        self.optimizer.zero_grad(set_to_none=True)
        (task_loss + weighted_sum(auxiliary, self.balance)).backward()
        if self.experts:
            self.experts.collect()
        correct = (logits_BC.argmax(dim=-1) == labels_B).sum()
        # A sum over the features, in float32, is not finite if one of them is not.
        output, bad_P = features.sum(dtype=torch.float32), None
        if share is not None:
            output, task_loss, correct, bad_P = self.exchange(share, output, task_loss, correct)
            if self.experts:
                self.experts.add_up(1 if share.split else world().size)
        if self.frozen:
            self.frozen.before_step()
        values = {OUTPUT: output, "task loss": task_loss, "gradient": self._clip()}
        values |= {f"auxiliary loss {name}": loss.sum() for name, loss in auxiliary.items()}
        self.numbers.record(values, *(() if bad_P is None else (bad_P,)))
        if self.checks_each_step and self.numbers.check():
            return None
        if not self.checks_each_step:
            self.optimizer.found_inf = self.numbers.found_inf
        self.optimizer.step()
        self.model.after_step(routings)
        if self.frozen:
            self.frozen.after_step()
        return self._result(task_loss, correct, routings, auxiliary, share is not None and share.split)

    def _task_loss(self, features: Tensor, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        if self.teacher is None:
            return F.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            targets_BC = self.teacher.targets(features)
        return self.teacher.loss(targets_BC, logits_BC, labels_B, self.label_smoothing)

    def _of_whole_batch(self, routings: tuple[Routing, ...], share: Share) -> tuple[Routing, ...]:
        """The combined routings of all processes, for the counters; the model has counted only its own part."""
        if share.split:
            routings = whole_batch(routings, share)
            for mixture, routing in zip(self.model.mixtures, routings, strict=True):
                mixture.count(routing)
        return routings

    @torch.no_grad()
    def _result(self, task_loss, correct, routings, auxiliary, split: bool) -> StepResult:
        dropped = [routing.dropped for routing in routings if routing.dropped is not None]
        counts = [routing.counts_E.sum() if split else len(routing.sample_A) for routing in routings]
        return StepResult(
            loss=task_loss.detach(),
            correct=correct,
            importance_LE=torch.stack([routing.importance_E for routing in routings]),
            dropped=sum(dropped) if dropped else torch.zeros_like(task_loss),
            auxiliary={name: loss.detach() for name, loss in auxiliary.items()},
            assignments=sum(counts),
            learned=routings[0].learned,
        )

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is clipped to `clip_norm` unless that is 0."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.experts.norm(gradients) if self.experts else get_total_norm(gradients)
        if self.clip_norm:
            clip_grads_with_norm_([*self.parameters, *self.of_experts], self.clip_norm, norm)
        return norm
