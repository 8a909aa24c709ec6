"""Training of adapters and mixtures in the last blocks of a frozen ViT, on stored tokens of the blocks below."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.blocks_methods import DENSE, Method
from benchmarks.common import synchronise
from benchmarks.study_heads import Features
from benchmarks.study_training import Average, order
from common.errors import UserError, one_line
from config.config import Config
from config.optim import OptimConfig
from evaluation.cost import flops, inside_cost, parameters
from evaluation.metrics import scores
from features.images import ImageBank
from model.backbone import Backbone
from model.balance import BalanceConfig
from model.classifier import NeckConfig
from model.experts import ExpertsConfig
from model.moe_vit import MoEViT, run_block
from model.preparation import prepare
from model.routers import RouterConfig
from model.vit_parts import embed
from storage.checkpoint import seed_everything
from training.graph import EAGER_STEPS, Captured
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

EVALUATION_BATCH = 500


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


class LastBlocks(nn.Module):
    """The last blocks of a frozen ViT, as a ViT whose input is the token input of the first of these blocks."""

    def __init__(self, vit: Any, first: int, patches: int):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*list(vit.blocks)[first:]), vit.norm
        self.embed_dim, self.num_prefix_tokens = vit.embed_dim, vit.num_prefix_tokens
        self.patch_embed = self.patch_drop = self.norm_pre = nn.Identity()
        self.patch_embed.num_patches = patches

    def _pos_embed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD  # tokens already include their position embeddings


class FrozenEnd:
    """`LastBlocks` as the backbone of a MoEViT; it shares the blocks' weights with the whole backbone."""

    def __init__(self, backbone: Backbone, first: int, patches: int, device: torch.device):
        self.vit: Any = LastBlocks(backbone.runner(device), first, patches)
        self.dtype, self.has_class_token = backbone.dtype, backbone.has_class_token
        self.features = [(pool, block - first) for pool, block in backbone.features if block >= first]
        self.blocks = sorted({block for _, block in self.features})

    def runner(self, device: torch.device) -> Any:
        """The ViT used for the computation."""
        return self.vit


@torch.no_grad()
def tokens_below(backbone: Backbone, images_BCHW: Tensor, first: int) -> Tensor:
    """The input of block `first` for uint8 images: (B, T, D) in the ViT's precision."""
    vit = backbone.runner(images_BCHW.device)
    x_BCHW = prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std)
    x_BTD, ropes = embed(vit, x_BCHW.to(backbone.dtype))
    if ropes[0] is not None:
        raise UserError("the study does not support a ViT with rotary embeddings: choose another --backbone.name")
    for block in list(vit.blocks)[:first]:
        x_BTD, _ = run_block(block, x_BTD, None, None, False, None)
    return x_BTD


def averaged(x_BTD: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The tokens with patches averaged over 2 x 2 blocks. prefix: number of tokens before the patches."""
    rows, columns = grid
    if rows % 2 or columns % 2:
        raise UserError(f"the study averages 2 x 2 patches, but this ViT has {rows} x {columns}: choose another")
    patches_BR2C2D = x_BTD[:, prefix:].unflatten(1, (rows // 2, 2, columns // 2, 2))
    return torch.cat([x_BTD[:, :prefix], patches_BR2C2D.mean(dim=(2, 4)).flatten(1, 2)], dim=1)


def stored_tokens(
    backbone: Backbone, bank: ImageBank, first: int, views: int, most: int | None = None
) -> dict[str, Features]:
    """Averaged tokens of `views` augmented views of the training images, and of the validation and test images.

    most: maximum number of images of each split.
    """

    def whole(split: str, view: int | None) -> Tensor:
        order_N = torch.arange(len(bank.splits[split]))[:most]
        batches = bank.batches(split, EVALUATION_BATCH, order_N, view)
        grid, prefix = backbone.vit.patch_embed.grid_size, backbone.vit.num_prefix_tokens
        return torch.cat([averaged(tokens_below(backbone, images, first), prefix, grid) for images, _ in batches])

    train_VNTD: Tensor | None = None
    for view in range(views):
        tokens_NTD = whole("train", view)
        if train_VNTD is None:
            train_VNTD = tokens_NTD.new_empty(views, *tokens_NTD.shape)
        train_VNTD[view] = tokens_NTD
    assert train_VNTD is not None
    labels = {name: bank.splits[name].labels_N[:most].to(bank.device) for name in ("train", "validation", "test")}
    classes = bank.splits.train.num_classes
    return {
        name: Features(train_VNTD, labels["train"], whole(name, None), labels[name], groups=1, classes=classes)
        for name in ("validation", "test")
    }


class MethodRuns:
    """The runs of one method in sequence, on the same model with re-initialised weights and the same CUDA graph.

    eager: no graph for any method. A step is that of train.py: forward, losses, backward, AdamW, average.
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
        router, balance = RouterConfig(**method.parts["router"]), BalanceConfig(**method.parts["balance"])
        experts = ExpertsConfig(place="blocks", kind="adapter", sizes=[[units] for units in method.sizes])
        neck = NeckConfig(kind="pooled", norm=config.neck.norm)
        self.fresh: Callable[[], MoEViT] = lambda: MoEViT(backbone, train.classes, neck, router, experts)
        self.random_steps = int(setting.warmup * self.steps) if router.random_steps and len(method.sizes) > 1 else 0
        self.model = self.fresh().to(self.device).train()
        self.optimizer = build_optimizer(self.model, self._optim(1e-3))
        self.average = Average(self.model, setting.ema)
        self.step = TrainingStep(self.model, self.optimizer, balance, setting.smoothing, 0.0, "auto")
        self.index_B = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        static = self.device.type == "cuda" and self.model.mixtures[0].router.static_shapes
        self.captured = Captured(self.device) if static and not eager else None
        self.seen = dict.fromkeys((False, True), 0)

    def _optim(self, lr: float) -> OptimConfig:
        warmup, decay = int(self.setting.lr_warmup * self.steps), self.setting.decay
        return OptimConfig(kind="adamw", lr=lr, weight_decay=decay, schedule="cosine", warmup_steps=warmup)

    def start(self, seed: int) -> None:
        """Re-initialise the weights in place with a seed; set moments, average and counters to zero."""
        seed_everything(seed)
        state = self.fresh().state_dict()
        self.model.load_state_dict(state)
        self.average.model.load_state_dict(state)
        for moments in self.optimizer.state.values():
            for value in moments.values():
                value.zero_()
        self.step.numbers.reset()
        self.model.train()

    def train(self, lr: float, seed: int) -> dict[str, Any] | str:
        """Scores on validation and test images, and their cost; or the term that was not finite."""
        began = time.perf_counter()
        self.start(seed)
        optim = self._optim(lr)
        for done, index_B in enumerate(order(seed, self.setting.epochs, self.read["test"], self.batch)):
            set_learning_rate(self.optimizer, done, self.steps, optim)
            self.average.before(done + 1)
            self.one_step(index_B, warmup=done < self.random_steps)
        if found := self.step.numbers.check():
            return f"the {found[1]} is not finite after {found[0]} steps"
        trained = time.perf_counter() - began
        held = {name: score(self.average.model, features) for name, features in self.read.items()}
        visits_E = held["test"].pop("visits")
        held["validation"].pop("visits")
        whole = time.perf_counter() - began
        return held | {"training_seconds": trained, "seconds": whole, **self.cost(np.array(visits_E))}

    def one_step(self, index_B: Tensor, warmup: bool) -> None:
        """Train on rows (B,) of the views; as a CUDA graph from the fourth step of its kind on.

        Raises CaptureFailed if capturing fails.
        """
        self.index_B.copy_(index_B)
        if self.captured is None:
            self._step(warmup)
            return
        capturing = self.seen[warmup] == EAGER_STEPS
        self.seen[warmup] += 1
        try:
            self.captured(self._step, warmup)
        except RuntimeError as error:
            if not capturing:
                raise
            raise CaptureFailed(f"{self.method.kind}: no CUDA graph ({one_line(error, 200)})") from error

    def _step(self, warmup: bool) -> None:
        labels_N = self.read["test"].labels_N
        labels_B = labels_N.index_select(0, self.index_B % len(labels_N))
        self.step(self.rows.index_select(0, self.index_B), labels_B, warmup)
        self.average.update()

    def cost(self, visits_E: np.ndarray) -> dict[str, Any]:
        """The cost of the trained part. visits_E: visits of each expert per token or image, mean over the blocks.

        A dense adapter is counted without its gate, which it does not need. active_width: hidden units used per token.
        """
        model = self.average.model
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

    def timed(self, steps: int) -> dict[str, float]:
        """Seconds of a step, of the setup before it, and of evaluating an image."""
        began = time.perf_counter()
        self.start(0)
        set_learning_rate(self.optimizer, 0, self.steps, self._optim(1e-3))
        index_B = torch.arange(self.batch, device=self.device)
        for _ in range(EAGER_STEPS + 2):
            self.one_step(index_B, warmup=self.random_steps > 0)
            self.one_step(index_B, warmup=False)
        synchronise(self.device)
        ready = time.perf_counter()
        for _ in range(steps):
            self.average.before(1)
            self.one_step(index_B, warmup=False)
        synchronise(self.device)
        done = time.perf_counter()
        for features in self.read.values():
            score(self.average.model, features)
        images = sum(len(features.held_labels_M) for features in self.read.values())
        evaluation = (time.perf_counter() - done) / images
        return {"setup": ready - began, "step": (done - ready) / steps, "evaluation": evaluation}


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
