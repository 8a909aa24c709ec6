"""Heads of benchmarks/incremental.py that are trained on stored features: a dense one, and a growing mixture."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Limit, captured, require_finite
from benchmarks.incremental_ridge import named, normalised
from benchmarks.incremental_scores import Scores, Stream
from config.config import Config
from config.optim import OptimConfig
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from model.transfer import Frozen, Shared, take
from storage.checkpoint import seed_everything
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

DENSE, FIRST, EACH = [[512]], [[256], [256]], [[256]]  # hidden units; the active number is the same in both
DRAWN = 200  # features drawn per old class in each step
RIDGE = 1e-3  # added to the diagonal of the covariance, relative to its mean: there are fewer images than features


class Heads:
    """Trains a head step by step, each step from the weights of the previous one, with class rows by name.

    Its input features are normalised separately, so that none dominates the drawn features.

    drawn: in addition to the images of a step, train on features drawn from a normal distribution for each old class,
    with its mean and a common within-class covariance.
    """

    def __init__(self, config: Config, stream: Stream, data: Any, seed: int, epochs: int, drawn: bool, limit: Limit):
        self.limit = limit
        self.stream, self.data, self.seed, self.epochs, self.drawn = stream, data, seed, epochs, drawn
        self.device, self.batch, self.graph = (
            data.labels_N.device,
            min(256, config.train.batch_size),
            config.train.graph,
        )
        self.width = data.train_VNF.shape[2]
        self.means: dict[int, Tensor] = {}
        self.scatter_FF, self.images = None, 0

    def run(self, kind: str) -> dict[str, Any]:
        """The scores of a `dense` head or a `mixture`."""
        seed_everything(self.seed)
        scores, before, seen_before = Scores(self.stream), None, []
        for step in range(len(self.stream.classes)):
            seen = self.stream.seen(step)
            features, labels = self._images(step, seen)
            model, frozen = self._model(kind, step, seen, before, seen_before, len(labels))
            self._train(model, frozen, features, labels)
            scores.add(lambda split, rows, model=model, seen=seen: self._answers(model, split, rows, seen))
            before, seen_before = model.state_dict(), seen
            if self.drawn:
                self._remember(step)
        return scores.result(self.device)

    def _model(self, kind: str, step: int, seen: list[int], before, seen_before, images: int):
        """The head for all classes so far, from the weights of the previous step, and its frozen parts."""
        neck = NeckConfig(kind="pooled", norm="each")
        steps = -(-images // self.batch) * self.epochs
        if kind == "dense":
            router, experts = RouterConfig(kind="mixtral", top_k=1, norm="none"), ExpertsConfig(sizes=DENSE)
        else:
            add = EACH if step else []
            sizes, grown = FIRST + EACH * step, [len(FIRST) + len(EACH) * done for done in range(step)]
            router = RouterConfig(kind="noisy_topk", top_k=2, warmup_steps=max(1, steps // 4))
            experts = ExpertsConfig(sizes=sizes, grown=grown, add=add)
        model = VisionMoE((self.width,), len(seen), neck, router, experts, self.data.groups).to(self.device)
        if before is None:
            return model, None
        shared = Shared.by_name([str(label) for label in seen], [str(label) for label in seen_before])
        take(model, before, shared)
        if kind == "dense":
            return model, None
        # With data of the old classes, gates and class rows continue to learn; experts do not.
        rehearsed = self.drawn or len(self.stream.kept[step])
        parts = ["neck", "experts"] if rehearsed else ["neck", "router", "experts", "head"]
        return model, Frozen(model, parts, shared, len(seen))

    def _images(self, step: int, seen: list[int]) -> tuple[Tensor, Tensor]:
        """Features (V, M, F) of the step's images in all views, with kept or drawn old ones, and class columns."""
        column = torch.zeros(max(seen) + 1, dtype=torch.int64, device=self.device)
        column[torch.tensor(seen, device=self.device)] = torch.arange(len(seen), device=self.device)
        kept = self.stream.kept[step][: 0 if self.drawn else None]
        rows = torch.cat([self.stream.rows[step], kept]).to(self.device)
        views = [normalised(view_NF[rows], self.data.groups).half() for view_NF in self.data.train_VNF]
        features_VMF, labels_M = torch.stack(views), self.data.labels_N[rows]
        if self.means:
            drawn_KF, names_K = self._draw()
            features_VMF = torch.cat([features_VMF, drawn_KF.to(features_VMF).expand(len(features_VMF), -1, -1)], dim=1)
            labels_M = torch.cat([labels_M, names_K])
        return features_VMF, column[labels_M]

    def _train(self, model: VisionMoE, frozen: Frozen | None, features_VMF: Tensor, labels_M: Tensor) -> None:
        optim = OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=10)
        optimizer = build_optimizer(model, optim)
        step = TrainingStep(model, optimizer, BalanceConfig(switch=0.01), 0.1, 1.0, "auto", frozen)
        run = captured(step, self.graph, self.batch)
        per_epoch, done = -(-len(labels_M) // self.batch), 0
        model.train()
        if frozen:
            frozen.hold()
        for epoch in range(self.epochs):
            view_MF = features_VMF[epoch % len(features_VMF)]
            for rows in torch.randperm(len(labels_M)).to(self.device).split(self.batch):
                self.limit.check()
                set_learning_rate(optimizer, done, per_epoch * self.epochs, optim)
                run(view_MF[rows].float(), labels_M[rows], warmup=False)
                done += 1
        require_finite(step)

    @torch.no_grad()
    def _answers(self, model: VisionMoE, split: str, rows: Tensor, seen: list[int]) -> Tensor:
        """The predicted classes for rows of a split."""
        model.eval()
        features_NF = getattr(self.data, split)[0]
        parts = (normalised(features_NF[part], self.data.groups) for part in rows.to(self.device).split(1024))
        return named(torch.cat([model(part)[0] for part in parts]), seen)

    def _remember(self, step: int) -> None:
        """Add a step's classes to the means, and its images to the common scatter."""
        if self.scatter_FF is None:
            self.scatter_FF = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        for label in self.stream.classes[step]:
            rows = torch.nonzero(self.data.labels_N == label).flatten()
            values = torch.cat([normalised(view_NF[rows], self.data.groups) for view_NF in self.data.train_VNF])
            self.means[label] = values.mean(dim=0)
            centred = (values - self.means[label]).double()
            self.scatter_FF += centred.T @ centred
            self.images += len(values)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Features (K, F) drawn for every old class, and their classes."""
        assert self.scatter_FF is not None
        covariance_FF = self.scatter_FF / self.images
        covariance_FF.diagonal().add_(RIDGE * float(covariance_FF.diagonal().mean()))
        factor_FF = torch.linalg.cholesky(covariance_FF).float()
        old = list(self.means)
        names_K = torch.tensor(old, device=self.device).repeat_interleave(DRAWN)
        centres_KF = torch.stack([self.means[label] for label in old]).repeat_interleave(DRAWN, dim=0)
        return centres_KF + torch.randn(len(names_K), self.width, device=self.device) @ factor_FF.T, names_K
