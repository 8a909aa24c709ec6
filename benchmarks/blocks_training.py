"""Training of adapters and mixtures in the last blocks of a frozen ViT, several runs side by side."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.blocks_methods import DENSE, Method
from benchmarks.blocks_vit import EVALUATION_BATCH, EndOfViT
from benchmarks.common import synchronise
from benchmarks.study_heads import Features
from benchmarks.study_training import Average, order
from common.errors import one_line
from config.config import Config
from config.optim import OptimConfig
from evaluation.cost import flops, inside_cost, parameters
from evaluation.metrics import scores
from model.balance import BalanceConfig
from model.classifier import NeckConfig
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from storage.checkpoint import seed_everything
from training.graph import EAGER_STEPS, Captured, concurrently
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

SIDE_BY_SIDE = 4  # the default number of runs that are trained at once


@dataclass(frozen=True)
class Setting:
    """The setting of all runs. first: the first block with experts. warmup: share of steps with random routing."""

    first: int
    epochs: int
    data: str
    backbone: str
    batch: int = 256
    ema: float = 0.99
    smoothing: float = 0.1
    decay: float = 0.05
    lr_warmup: float = 0.1
    warmup: float = 0.05


class CaptureFailed(Exception):
    """A step cannot be captured as a CUDA graph; this process should not continue afterwards."""


class Slot:
    """One of the runs side by side: a model with its optimizer and average, which are re-initialised for each run."""

    def __init__(self, model: EndOfViT, optim: OptimConfig, balance: BalanceConfig, setting: Setting, batch: int):
        self.model, self.optimizer = model, build_optimizer(model, optim)
        self.average = Average(model, setting.ema)
        self.step = TrainingStep(model, self.optimizer, balance, setting.smoothing, 0.0, "auto")
        self.index_B = torch.zeros(batch, dtype=torch.int64, device=self.step.device)
        self.stream = torch.cuda.Stream(self.step.device) if self.step.device.type == "cuda" else None

    def start(self, state: dict[str, Tensor]) -> None:
        """Load initial weights; set moments, average and counters to zero."""
        self.model.load_state_dict(state)
        self.average.model.load_state_dict(state)
        for moments in self.optimizer.state.values():
            for value in moments.values():
                value.zero_()
        self.step.numbers.reset()
        self.model.train()

    def train(self, rows: Tensor, labels_N: Tensor, warmup: bool) -> None:
        """One step on the rows of index_B."""
        labels_B = labels_N.index_select(0, self.index_B % len(labels_N))
        self.step(rows.index_select(0, self.index_B), labels_B, warmup)
        self.average.update()


class MethodRuns:
    """The runs of one method, on the same models with re-initialised weights and the same CUDA graphs.

    Several runs are trained at once, as one graph with a stream for each, because many kernels of a step are too small
    to fill a GPU. They draw gate noise from one generator. eager: no graph, and the runs take turns. A step is that of
    train.py: forward, losses, backward, AdamW, average.
    """

    def __init__(
        self, method: Method, backbone: Any, config: Config, read: dict[str, Features], setting: Setting, eager: bool
    ):
        self.method, self.read, self.setting = method, read, setting
        self.device = read["test"].labels_N.device
        train = read["test"]
        self.rows = train.train_VNF.flatten(0, 1)
        self.batch = min(setting.batch, len(train.labels_N))
        self.steps = setting.epochs * (len(train.labels_N) // self.batch)
        router, self.balance = RouterConfig(**method.parts["router"]), BalanceConfig(**method.parts["balance"])
        experts = ExpertsConfig(place="blocks", kind="adapter", sizes=[[units] for units in method.sizes])
        neck = NeckConfig(kind="pooled", norm=config.neck.norm)
        self.fresh: Callable[[], EndOfViT] = lambda: EndOfViT(backbone, train.classes, neck, router, experts)
        self.random_steps = int(setting.warmup * self.steps) if router.random_steps and len(method.sizes) > 1 else 0
        self.slots = [self._slot()]
        static = self.device.type == "cuda" and self.model.mixtures[0].router.static_shapes
        self.captured = Captured(self.device) if static and not eager else None
        self.seen: Counter[tuple[bool, int]] = Counter()

    @property
    def model(self) -> EndOfViT:
        """The model of the first run."""
        return self.slots[0].model

    def _slot(self) -> Slot:
        model = self.fresh().to(self.device).train()
        return Slot(model, self._optim(1e-3), self.balance, self.setting, self.batch)

    def _optim(self, lr: float) -> OptimConfig:
        warmup, decay = int(self.setting.lr_warmup * self.steps), self.setting.decay
        return OptimConfig(kind="adamw", lr=lr, weight_decay=decay, schedule="cosine", warmup_steps=warmup)

    def start(self, seeds: Sequence[int]) -> list[Slot]:
        """Slots with initial weights of these seeds."""
        self.slots += [self._slot() for _ in range(len(self.slots), len(seeds))]
        for slot, seed in zip(self.slots, seeds, strict=False):
            seed_everything(seed)
            slot.start(self.fresh().state_dict())
        seed_everything(seeds[0])  # for the gate noise, which all runs draw from one generator
        return self.slots[: len(seeds)]

    def train(self, runs: Sequence[tuple[float, int]]) -> list[dict[str, Any] | str]:
        """Train runs (rate, seed) side by side: scores on validation and test images, and cost, of each.

        For a run in which a term is not finite, a sentence that names the term. Seconds are divided by the number of
        runs.
        """
        began = time.perf_counter()
        slots = self.start([seed for _, seed in runs])
        optims = [self._optim(lr) for lr, _ in runs]
        orders = [order(seed, self.setting.epochs, self.read["test"], self.batch) for _, seed in runs]
        for done, indices in enumerate(zip(*orders, strict=True)):
            for slot, optim, index_B in zip(slots, optims, indices, strict=True):
                set_learning_rate(slot.optimizer, done, self.steps, optim)
                slot.average.before(done + 1)
                slot.index_B.copy_(index_B)
            self.one_step(len(slots), warmup=done < self.random_steps)
        synchronise(self.device)
        trained = (time.perf_counter() - began) / len(slots)
        return [self._outcome(slot, trained) for slot in slots]

    def _outcome(self, slot: Slot, trained: float) -> dict[str, Any] | str:
        if found := slot.step.numbers.check():
            return f"the {found[1]} is not finite after {found[0]} steps"
        began = time.perf_counter()
        held = {name: score(slot.average.model, features) for name, features in self.read.items()}
        visits_E = held["test"].pop("visits")
        held["validation"].pop("visits")
        whole = trained + time.perf_counter() - began
        return held | {"training_seconds": trained, "seconds": whole, **self.cost(np.array(visits_E))}

    def one_step(self, count: int, warmup: bool) -> None:
        """Train the first `count` slots; as a CUDA graph from the fourth step of its kind on.

        Raises CaptureFailed if capturing fails.
        """
        kind = warmup, count
        if self.captured is None:
            self._in_turn(kind)
            return
        capturing = self.seen[kind] == EAGER_STEPS
        self.seen[kind] += 1
        try:
            self.captured(self._side_by_side, kind)
        except RuntimeError as error:
            if not capturing:
                raise
            raise CaptureFailed(f"{self.method.kind}: no CUDA graph ({one_line(error, 200)})") from error

    def _in_turn(self, kind: tuple[bool, int]) -> None:
        warmup, count = kind
        for slot in self.slots[:count]:
            slot.train(self.rows, self.read["test"].labels_N, warmup)

    def _side_by_side(self, kind: tuple[bool, int]) -> None:
        warmup, count = kind
        labels_N = self.read["test"].labels_N
        slots = [(slot.stream, partial(slot.train, self.rows, labels_N, warmup)) for slot in self.slots[:count]]
        concurrently(self.device, slots)

    def cost(self, visits_E: np.ndarray) -> dict[str, Any]:
        """The cost of the trained part. visits_E: visits of each expert per token or image, mean over the blocks.

        A dense adapter is counted without its gate, which it does not need. active_width: hidden units used per token.
        """
        model = self.model
        router = model.mixtures[0].router
        found = inside_cost(model, visits_E / router.experts_per_sample)
        blocks = len(model.mixtures)
        gates, gate_parameters = 0, 0
        if self.method.name == DENSE:
            gates = blocks * flops(router, torch.zeros(model.num_tokens, model.width, device=self.device))
            gate_parameters = blocks * parameters(router)
        return {
            "flops": found.flops - gates,
            "active_parameters": found.active_parameters - gate_parameters,
            "trained_parameters": parameters(model) - gate_parameters,
            "active_width": float(visits_E @ np.array(self.method.sizes)),
            "load": (visits_E / visits_E.sum()).tolist(),
        }

    def timed(self, steps: int, count: int) -> dict[str, float]:
        """Seconds of a step of one of `count` runs, of the setup before it, and of evaluating an image."""
        began = time.perf_counter()
        for slot in self.start([0] * count):
            set_learning_rate(slot.optimizer, 0, self.steps, self._optim(1e-3))
            slot.index_B.copy_(torch.arange(self.batch))
            slot.average.before(1)
        for _ in range(EAGER_STEPS + 2):
            self.one_step(count, warmup=self.random_steps > 0)
            self.one_step(count, warmup=False)
        synchronise(self.device)
        ready = time.perf_counter()
        for _ in range(steps):
            self.one_step(count, warmup=False)
        synchronise(self.device)
        done = time.perf_counter()
        for features in self.read.values():
            score(self.slots[0].average.model, features)
        images = sum(len(features.held_labels_M) for features in self.read.values())
        evaluation = (time.perf_counter() - done) / images
        return {"setup": ready - began, "step": (done - ready) / steps / count, "evaluation": evaluation}


@torch.no_grad()
def score(model: Any, features: Features) -> dict[str, Any]:
    """Scores on the held-out images, and the visits of each expert per token or image, averaged over the blocks."""
    model.eval()
    answers, counts_E, samples = [], 0, 0
    for x_BTD in features.held_MF.split(EVALUATION_BATCH):
        logits_BC, routings = model(x_BTD)
        answers.append(logits_BC.argmax(dim=-1))
        counts_E = counts_E + torch.stack([routing.counts_E for routing in routings]).sum(dim=0)
        samples += sum(routing.num_samples for routing in routings)
    predicted_M = torch.cat(answers).cpu().numpy()
    found = scores(features.held_labels_M.cpu().numpy(), predicted_M, features.classes)
    return found | {"visits": (torch.as_tensor(counts_E).double() / samples).tolist()}
