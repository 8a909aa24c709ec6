"""Experts inside the ViT for benchmarks/incremental.py: the default recipe on classes that arrive in steps."""

import argparse
from typing import Any

import torch
from torch import Tensor

from assembly.pipeline import build_model, compile_blocks
from benchmarks.common import Limit, require_finite
from benchmarks.incremental_data import Data
from benchmarks.incremental_ridge import named
from benchmarks.incremental_scores import Scores, Stream
from common.network import reachable
from config.config import Config
from data.image_set import Splits
from features.images import ImageBank
from model.backbone import load_backbone
from storage.checkpoint import seed_everything
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep


class Inside:
    """A ViT with experts in its blocks, compiled once for all seeds. options: of the benchmark."""

    def __init__(
        self, config: Config, splits: Splits, device: torch.device, stream: Stream, options: Any, limit: Limit
    ):
        self.config, self.device, self.stream, self.limit = config, device, stream, limit
        self.options: argparse.Namespace = options
        self.bank = ImageBank(splits, config.augment, device, config.features.batch_size)
        self.backbone = load_backbone(config.backbone, device, reachable)
        self.classes = splits.train.num_classes
        self.model: Any = self._fresh().to(device)
        compile_blocks(config, self.model, device)
        self.view = 0

    def run(self, seed: int) -> dict[str, Any]:
        """The scores of the default recipe, trained on each step's images; its head has rows for all classes."""
        scores = Scores(self.stream)
        self._start(seed)
        for step in range(len(self.stream.classes)):
            self._train(step, self.options.block_epochs)
            seen = self.stream.seen(step)
            scores.add(lambda split, rows, seen=seen: self._answers(split, rows, seen))
        return scores.result(self.device)

    def adapted(self, seed: int) -> Data:
        """The head's input for all images, after training only on the first step, in the views of the benchmark."""
        self._start(seed)
        self._train(0, self.options.first_epochs)
        return self._features()

    def _fresh(self) -> Any:
        return build_model(self.config, self.bank.feature_shape, self.classes, self.backbone)

    def _start(self, seed: int) -> None:
        """Weights of a newly initialised model."""
        seed_everything(seed)
        self.model.load_state_dict(self._fresh().state_dict())
        self.view = 0

    def _train(self, step: int, epochs: int) -> None:
        """Train some epochs on the images of a step, each with a different view."""
        train, optim = self.config.train, self.config.optim
        rows = torch.cat([self.stream.rows[step], self.stream.kept[step]])
        batch = min(train.batch_size, len(rows))
        per_epoch, done = len(rows) // batch, 0
        total = per_epoch * epochs
        optim = type(optim)(**{**vars(optim), "warmup_steps": min(optim.warmup_steps, total // 5)})
        optimizer = build_optimizer(self.model, optim)
        one_step = TrainingStep(
            self.model, optimizer, self.config.balance, train.label_smoothing, optim.clip_norm, train.precision
        )
        self.model.train()
        for _ in range(epochs):
            # Only full batches: another size would be compiled again.
            order = rows[torch.randperm(len(rows))][: per_epoch * batch]
            for images, labels_B in self.bank.batches("train", batch, order, view=self.view):
                self.limit.check()
                set_learning_rate(optimizer, done, total, optim)
                one_step(images, labels_B, warmup=False)
                done += 1
            self.view += 1
        require_finite(one_step)

    @torch.no_grad()
    def _answers(self, split: str, rows: Tensor, seen: list[int]) -> Tensor:
        """The predicted classes for rows of a split."""
        self.model.eval()
        columns = torch.tensor(seen, device=self.device)
        batches = self.bank.batches(split, self.bank.evaluation_batch, rows)
        return named(torch.cat([self.model(images)[0][:, columns] for images, _ in batches]), seen)

    @torch.no_grad()
    def _features(self) -> Data:
        self.model.eval()
        read: list[Tensor] = []
        hook = self.model.neck.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].half()))

        def whole(split: str, view: int | None = None) -> tuple[Tensor, Tensor]:
            read.clear()
            labels = []
            for images, labels_B in self.bank.batches(split, self.bank.evaluation_batch, view=view):
                self.limit.check()
                self.model(images)
                labels.append(labels_B)
            return torch.cat(read), torch.cat(labels)

        parts = [whole("train", view) for view in range(self.options.views)]
        validation, test = whole("validation"), whole("test")
        hook.remove()
        train_VNF = torch.stack([features for features, _ in parts])
        return Data(train_VNF, parts[0][1], validation, test, len(self.config.backbone.features))
