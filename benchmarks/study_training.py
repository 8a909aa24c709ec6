"""Training of the heads of a study on features in memory, several heads in one pass."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.answers import calibration
from analysis.routing import expert_load, load_entropy, specialisation
from benchmarks.study_heads import SETTINGS, Features, Job, build, dense, flops_of
from config.optim import OptimConfig
from evaluation.metrics import scores
from model.balance import BalanceConfig
from model.classifier import VisionMoE
from model.routers import RouterConfig
from storage.checkpoint import seed_everything
from training.graph import Captured, concurrently, worth_capturing
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

PERMUTATIONS = 200
Outcome = tuple[dict[str, Any], np.ndarray] | str
"""Scores and the expert with the largest weight of each held-out image (int16, -1: none), or a failure reason."""


def side_by_side(head: dict[str, Any], features: Features) -> bool:
    """Whether the steps of several such heads can be one CUDA graph; heads on tokens use a whole GPU by themselves."""
    if "logistic" in head or not features.labels_N.is_cuda or features.held_MF.ndim > 2:
        return False
    with torch.device("meta"):
        return build(head, features, 0.0).moe.router.static_shapes


def train_heads(jobs: list[Job], features: Features) -> list[Outcome]:
    """Train several heads of one method together and score their moving averages on the held-out images, in order.

    Weights and batches of a head depend only on its seed; its dropout and noise also depend on the other heads.
    """
    if "logistic" in jobs[0].head:
        return [score(logistic(features, job.settings["weight_decay"]), features) for job in jobs]
    batch = min(SETTINGS["batch"], len(features.labels_N))
    steps = jobs[0].epochs * (len(features.labels_N) // batch)
    heads = [Head(job, features, steps) for job in jobs]
    seed_everything(jobs[0].seed)
    train = Pass(heads, features, batch)
    for indices in zip(*(order(job.seed, job.epochs, features, batch) for job in jobs), strict=True):
        train(indices)
    outcomes = [head.outcome(features) for head in heads]
    del heads, train
    if features.labels_N.is_cuda:
        torch.cuda.empty_cache()  # for the other processes on this GPU
    return outcomes


class Head:
    """A job's model during training: the work before and in a step."""

    def __init__(self, job: Job, features: Features, steps: int):
        seed_everything(job.seed)
        settings = dict(job.settings)
        self.model = build(job.head, features, settings.pop("dropout")).to(features.labels_N.device).train()
        self.optim, self.steps, self.done = OptimConfig(**settings), steps, 0
        self.optimizer = build_optimizer(self.model, self.optim)
        self.average = Average(self.model, SETTINGS["ema"])
        balance = BalanceConfig(**job.head.get("balance", {"switch": 0.0}))
        smoothing, clip = SETTINGS["smoothing"], self.optim.clip_norm
        self.step = TrainingStep(self.model, self.optimizer, balance, smoothing, clip, "auto")
        self.random = RouterConfig(**job.head["router"]).random_steps > 0
        self.leads = True

    def follow(self, leader: "Head") -> None:
        """Read values that change in each step from the leader's tensors, if they are the same for both."""
        if self.optim != leader.optim or not isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            return
        for group, theirs in zip(self.optimizer.param_groups, leader.optimizer.param_groups, strict=True):
            group["lr"] = theirs["lr"]
        self.average.weight, self.leads = leader.average.weight, False

    @property
    def warms(self) -> bool:
        """Whether the next step routes at random."""
        return self.random and self.done < SETTINGS["warmup"] * self.steps

    def before(self) -> None:
        """Set the learning rate and the weight of the average for the next step."""
        if self.leads:
            set_learning_rate(self.optimizer, self.done, self.steps, self.optim)
            self.average.before(self.done + 1)
        self.done += 1

    def train(self, x_BF: Tensor, labels_B: Tensor, warmup: bool) -> None:
        """One step on a batch."""
        self.step(x_BF, labels_B, warmup)
        self.average.update()

    def outcome(self, features: Features) -> Outcome:
        """The scores of the trained head, or the term that was not finite."""
        if found := self.step.numbers.check():
            return f"the {found[1]} is not finite after {found[0]} steps"
        return score(self.average.model, features)


class Average:
    """timm's moving average of a model with its warm-up; its weight is on the device, so that a CUDA graph can read it.

    model: the averaged model.
    """

    def __init__(self, model: VisionMoE, decay: float):
        from timm.utils import ModelEmaV3

        self.timm = ModelEmaV3(model, decay=decay, use_warmup=True)
        self.model = self.timm.module
        self.weight = torch.zeros((), device=next(model.parameters()).device)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self.averages, self.values = map(list, zip(*(p for p in pairs if p[0].is_floating_point()), strict=True))
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def before(self, step: int) -> None:
        """Set the weight of the model after this number of steps."""
        self.weight.fill_(1 - self.timm.get_decay(step))

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the model."""
        differences = torch._foreach_sub(self.values, self.averages)
        torch._foreach_mul_(differences, self.weight)
        torch._foreach_add_(self.averages, differences)
        for mine, theirs in self.counters:
            mine.copy_(theirs)


class Pass:
    """A step of several heads of one method: one CUDA graph if their shapes allow it, with a separate stream per head.

    The kernels of a small head leave most of a GPU idle, so those of several heads run concurrently. Heads that cannot
    be captured, and all heads on a CPU, run one after another.
    """

    def __init__(self, heads: list[Head], features: Features, batch: int):
        self.heads, self.labels_N, self.device = heads, features.labels_N, features.labels_N.device
        self.rows = features.train_VNF.flatten(0, 1)
        self.index_SB = torch.zeros(len(heads), batch, dtype=torch.int64, device=self.device)
        self.captured: Captured | None = None
        if all(worth_capturing("auto", head.model, batch) for head in heads):
            self.captured = Captured(self.device)
            self.streams = [torch.cuda.Stream(self.device) for _ in heads]
        for head in heads[1:]:
            head.follow(heads[0])

    def __call__(self, indices: tuple[Tensor, ...]) -> None:
        """Train each head on its rows of the views, (B,) into V * N."""
        warmup = self.heads[0].warms
        for head in self.heads:
            head.before()
        torch.stack(indices, out=self.index_SB)
        if self.captured:
            self.captured(self._side_by_side, warmup)
            return
        for head, index_B in zip(self.heads, self.index_SB, strict=True):
            self._train(head, index_B, warmup)

    def _train(self, head: Head, index_B: Tensor, warmup: bool) -> None:
        labels_B = self.labels_N.index_select(0, index_B % len(self.labels_N))
        head.train(self.rows.index_select(0, index_B), labels_B, warmup)

    def _side_by_side(self, warmup: bool) -> None:
        steps = [partial(self._train, head, row, warmup) for head, row in zip(self.heads, self.index_SB, strict=True)]
        concurrently(self.device, list(zip(self.streams, steps, strict=True)))


def order(seed: int, epochs: int, features: Features, batch: int) -> Iterator[Tensor]:
    """The rows of each step, (B,) into V * N; they depend only on the seed, so equal seeds see the same batches."""
    views, samples = features.train_VNF.shape[:2]
    for epoch in range(epochs):
        order_N = torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows_N = order_N[: samples // batch * batch] + epoch % views * samples
        yield from rows_N.to(features.labels_N.device).split(batch)


def logistic(features: Features, decay: float) -> VisionMoE:
    """Multinomial logistic regression on standardised original images, to convergence by L-BFGS; independent of seeds.

    decay: weight of half the squared norm of the weights, relative to the mean loss.
    """
    model = build({**dense(), "norm": "batch"}, features, dropout=0.0).to(features.labels_N.device)
    x_NF = (features.train_VNF[0] if features.plain_NF is None else features.plain_NF).float()
    with torch.no_grad():
        model.neck.norm.running_mean.copy_(x_NF.mean(dim=0))
        model.neck.norm.running_var.copy_(x_NF.var(dim=0))
    linear = model.moe.experts[0][0]
    with torch.no_grad():
        x_NF = model.eval().neck(x_NF)
        linear.weight.zero_()
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x_NF), features.labels_N) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@torch.no_grad()
def score(model: VisionMoE, features: Features) -> tuple[dict[str, Any], np.ndarray]:
    """Scores, balance, specialisation and cost of a trained head on the held-out images."""
    model.eval()
    logits, experts, weights, samples, seen = [], [], [], [], 0
    for x_BF in features.held_MF.split(SETTINGS["batch"]):
        logits_BC, (routing,) = model(x_BF)
        logits.append(logits_BC)
        samples.append(routing.sample_A + seen)
        experts.append(routing.expert_A)
        weights.append(routing.weight_A)
        seen += len(x_BF)
    logits_MC = torch.cat(logits)
    sample_A, expert_A, weight_A = (torch.cat(parts).cpu().numpy() for parts in (samples, experts, weights))
    labels_M = features.held_labels_M.cpu().numpy()
    number = len(model.moe.experts)
    routes = number > 1 and len(expert_A) < number * len(labels_M)  # else every expert processes every image
    found = {
        **scores(labels_M, logits_MC.argmax(dim=-1).cpu().numpy(), features.classes),
        "loss": float(F.cross_entropy(logits_MC, features.held_labels_M)),
        "ece": float(calibration(logits_MC.softmax(dim=-1).cpu().numpy(), labels_M)["error"]),
        "entropy": load_entropy(expert_load(expert_A, number)) if routes else None,
        "flops": flops_of(model, features, np.bincount(expert_A, minlength=number) / len(labels_M)),
        "experts": number,
    }
    if routes:
        found["specialisation"] = specialisation(
            labels_M, sample_A, expert_A, features.classes, number, permutations=PERMUTATIONS
        )
    first_M = np.full(len(labels_M), -1, dtype=np.int16)
    order_A = np.argsort(weight_A, kind="stable")  # the largest weight of a sample is written last
    first_M[sample_A[order_A]] = expert_A[order_A]
    return found, first_M
