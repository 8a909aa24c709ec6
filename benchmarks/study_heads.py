"""The heads that the study compares, and the training of one of them on features in memory."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.answers import calibration
from analysis.routing import expert_load, load_entropy, specialisation
from engine.checkpoint import seed_everything
from engine.graph import GraphedStep, worth_capturing
from engine.metrics import scores
from engine.optim import OptimConfig, build_optimizer, set_learning_rate
from engine.step import TrainingStep
from engine.summary import head_cost
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig

BATCH, EMA, SMOOTHING, PERMUTATIONS = 1024, 0.999, 0.1, 200


@dataclass(frozen=True)
class Features:
    """What every head reads: train_VNF of V views, one evaluation split, labels, and the groups that F is made of.

    F stands for (T, D) where they are tokens.
    """

    train_VNF: Tensor
    labels_N: Tensor
    held_MF: Tensor
    held_labels_M: Tensor
    groups: int
    classes: int


@dataclass
class Job:
    """One head, trained once. head: sections of the configuration as plain values. stage: which Features it reads."""

    method: str
    head: dict[str, Any]
    seed: int
    stage: str
    epochs: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The job as one line, by which a finished one is known again."""
        return json.dumps(asdict(self), sort_keys=True)


def dense(*width: int) -> dict[str, Any]:
    """One MLP with a hidden layer of `width` units; without a width a linear head."""
    return {"router": {"kind": "noisy_topk", "top_k": 1}, "experts": {"sizes": [list(width)]}, "warmup": 0}


def mixture(kind: str, sizes: list[int], top_k: int, switch: float = 0.01, shared: int = 0, **router) -> dict[str, Any]:
    """A mixture of experts with one hidden layer each."""
    experts = {"sizes": [[width] for width in sizes], "shared": [[shared]] if shared else []}
    return {"router": {"kind": kind, "top_k": top_k, **router}, "experts": experts, "balance": {"switch": switch}}


def router_methods(width: int) -> dict[str, dict[str, Any]]:
    """Every routing rule with eight experts of `width` units, two of them active; dense heads matched to both."""
    equal, half = [width] * 8, [2 * width] * 4
    unequal = [width // 4, width // 2, width, 9 * width // 4] * 2
    return {
        "logistic regression": {"logistic": True},
        "linear head": dense(),
        f"dense, {2 * width} units (active)": dense(2 * width),
        f"dense, {8 * width} units (total)": dense(8 * width),
        "article": mixture("article", equal, 2, switch=0.0),
        "noisy_topk": mixture("noisy_topk", equal, 2),
        "noisy_topk, unequal": mixture("noisy_topk", unequal, 2),
        "noisy_topk, probabilities": {**mixture("noisy_topk", equal, 2), "combine": "probabilities"},
        "vmoe": mixture("vmoe", equal, 2),
        "switch, 4 experts": mixture("switch", half, 1, capacity_factor=1.25),
        "gshard": mixture("gshard", equal, 2, capacity_factor=2.0),
        "mixtral": mixture("mixtral", equal, 2),
        "deepseek, shared": mixture("deepseek", equal, 1, switch=0.0, shared=width),
        "hierarchical": mixture("hierarchical", equal, 2),
        "expert_choice": mixture("expert_choice", equal, 2, switch=0.0),
        "hash": mixture("hash", equal, 2, switch=0.0),
        "shared + 16 small": mixture("noisy_topk", [width // 4] * 16, 2, shared=3 * width // 2, inputs=[-1]),
    }


def token_methods(width: int) -> dict[str, dict[str, Any]]:
    """Soft MoE with as many hidden units as `router_methods`, and one dense head behind the same attention pooling."""
    return {
        f"dense behind one slot, {8 * width} units": mixture("soft_moe", [8 * width], 1, switch=0.0),
        "soft_moe, 8 experts": mixture("soft_moe", [width] * 8, 1, switch=0.0),
        "soft_moe, 8 experts, 4 slots": mixture("soft_moe", [width] * 8, 1, switch=0.0, slots=4),
    }


def width_methods(width: int, groups: int) -> dict[str, dict[str, Any]]:
    """A dense head of `width` units, and mixtures that cost a sample no more, their gates included.

    The gate reads one of so many feature groups, and so costs its number of experts over theirs in hidden units. A
    quarter of the units, 128 at most, is routed beside a shared expert; or all of them, to one of eight experts (four
    above 512 units).
    """

    def gate(experts: int) -> int:
        return math.ceil(experts / groups)

    found = {f"dense {width}": dense(width)}
    number = 8 if width <= 512 else 4
    if width <= 2048:
        found[f"all routed, top-1 {width}"] = mixture("noisy_topk", [width - gate(number)] * number, 1, inputs=[-1])
    routed = max(4, min(width // 4, 128))
    for experts, top_k in ((16, 1), (32, 2)):
        shared = width - routed - gate(experts)
        if shared > 0:
            found[f"shared + top-{top_k} of {experts} {width}"] = mixture(
                "noisy_topk", [routed // top_k] * experts, top_k, shared=shared, inputs=[-1]
            )
    return found


def grid(head: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that every method may choose among on validation images: the same number for all."""
    if "logistic" in head:
        return [{"weight_decay": decay} for decay in (1e-6, 1e-5, 1e-4, 1e-3)]
    return [{"lr": lr, "weight_decay": 1.0, "dropout": dropout} for lr in (1e-3, 2e-3) for dropout in (0.1, 0.4)]


def build(head: dict[str, Any], features: Features, dropout: float) -> VisionMoE:
    """The model of a head; a gate input of -1 names the last feature group."""
    router = dict(head["router"])
    if router.get("inputs"):
        router["inputs"] = [group % features.groups for group in router["inputs"]]
    combine = head.get("combine", "logits")
    # Every expert on every sample has static shapes whatever the number of experts, which a CUDA graph needs.
    experts = ExpertsConfig(**head["experts"], dropout=dropout, combine=combine, dispatch="dense")
    shape = tuple(features.train_VNF.shape[2:])
    neck = NeckConfig(kind="pooled" if len(shape) == 1 else "tokens", norm=head.get("norm", "layer"))
    return VisionMoE(shape, features.classes, neck, RouterConfig(**router), experts, features.groups)


def train_head(job: Job, features: Features) -> tuple[dict[str, Any], np.ndarray]:
    """Train a head and score its moving average on the held-out images.

    The order of the samples depends on seed and epoch alone, so that heads of one seed see the same batches. Returns
    the scores, and the expert of largest weight of each held-out image, int16 (-1 where none is).
    """
    from timm.utils import ModelEmaV3

    device, samples = features.labels_N.device, len(features.labels_N)
    seed_everything(job.seed)
    if "logistic" in job.head:
        return score(logistic(features, job.settings["weight_decay"]), features)
    settings = dict(job.settings)
    model = build(job.head, features, settings.pop("dropout")).to(device)
    optim = OptimConfig(**settings)
    balance = BalanceConfig(**job.head.get("balance", {"switch": 0.0}))
    optimizer = build_optimizer(model, optim)
    ema = ModelEmaV3(model, decay=EMA, use_warmup=True)
    step = TrainingStep(model, optimizer, balance, SMOOTHING, optim.clip_norm, "auto")
    batch = min(BATCH, samples)
    train_step = GraphedStep(step, batch) if worth_capturing("auto", model) else step
    total = job.epochs * (samples // batch)
    warmup_steps = job.head.get("warmup", total // 8) if model.moe.router.learns else 0
    done = 0
    model.train()
    for epoch in range(job.epochs):
        generator = torch.Generator().manual_seed(job.seed * 1_000_003 + epoch)
        order_N = torch.randperm(samples, generator=generator).to(device)
        view_NF = features.train_VNF[epoch % len(features.train_VNF)]
        for index_B in order_N[: samples // batch * batch].split(batch):
            set_learning_rate(optimizer, done, total, optim)
            train_step(view_NF[index_B], features.labels_N[index_B], done < warmup_steps)
            done += 1
            ema.update(model, step=done)
    if found := step.numbers.look():
        raise ValueError(f"the {found[1]} is not finite after {found[0]} steps")
    return score(ema.module, features)


def logistic(features: Features, decay: float) -> VisionMoE:
    """Multinomial logistic regression on the first view, standardised, to convergence by L-BFGS: no seed matters.

    decay: weight of half the squared norm of the weights beside the mean loss.
    """
    model = build({**dense(), "norm": "batch"}, features, dropout=0.0).to(features.labels_N.device)
    x_NF = features.train_VNF[0].float()
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
    for x_BF in features.held_MF.split(BATCH):
        logits_BC, routing = model(x_BF)
        logits.append(logits_BC)
        samples.append(routing.sample_A + seen)
        experts.append(routing.expert_A)
        weights.append(routing.weight_A)
        seen += len(x_BF)
    logits_MC = torch.cat(logits)
    sample_A, expert_A, weight_A = (torch.cat(parts).cpu().numpy() for parts in (samples, experts, weights))
    labels_M = features.held_labels_M.cpu().numpy()
    number = len(model.moe.experts)
    load_E = expert_load(expert_A, number)
    found = {
        **scores(labels_M, logits_MC.argmax(dim=-1).cpu().numpy(), features.classes),
        "loss": float(F.cross_entropy(logits_MC, features.held_labels_M)),
        "ece": float(calibration(logits_MC.softmax(dim=-1).cpu().numpy(), labels_M)["error"]),
        "entropy": load_entropy(load_E) if number > 1 else None,
        "flops": head_cost(model, tuple(features.held_MF.shape[1:]), load_E).flops,
    }
    if number > 1:
        found["specialisation"] = specialisation(
            labels_M, sample_A, expert_A, features.classes, number, permutations=PERMUTATIONS
        )
    first_M = np.full(len(labels_M), -1, dtype=np.int16)
    order_A = np.argsort(weight_A, kind="stable")  # the largest weight of a sample is written last
    first_M[sample_A[order_A]] = expert_A[order_A]
    return found, first_M
