"""Experts inside the ViT for benchmarks/incremental.py: the default recipe on classes that come in steps."""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from assembly.pipeline import build_model, compile_blocks
from benchmarks.common import synchronise
from benchmarks.incremental_ridge import named, ridge
from benchmarks.incremental_scores import Stream, by_step, scored
from common.network import reachable
from config.config import Config
from data.image_set import Splits
from features.images import ImageBank
from model.backbone import load_backbone
from storage.checkpoint import seed_everything
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep


class Inside:
    """A ViT with experts in its blocks; a new one for each method. options: of the benchmark."""

    def __init__(
        self,
        config: Config,
        splits: Splits,
        device: torch.device,
        stream: Stream,
        seed: int,
        options: argparse.Namespace,
    ):
        self.config, self.device, self.stream, self.seed, self.options = config, device, stream, seed, options
        self.bank = ImageBank(splits, config.augment, device, config.features.batch_size)
        self.backbone = load_backbone(config.backbone, device, reachable)
        self.classes = splits.train.num_classes

    def run(self, name: str) -> dict[str, Any]:
        """The scores of `blocks` or `blocks_ridge`; the head has rows for all classes from the beginning."""
        seed_everything(self.seed)
        self.view = 0
        model: Any = build_model(self.config, self.bank.feature_shape, self.classes, self.backbone).to(self.device)
        compile_blocks(self.config, model, self.device)
        began = time.perf_counter()
        if name == "blocks":
            accuracy_TT = []
            for step in range(len(self.stream.classes)):
                self._train(model, step)
                accuracy_TT.append(self._score(model, step))
            synchronise(self.device)
            return scored(self.stream, accuracy_TT, time.perf_counter() - began)
        self._train(model, 0)
        features = self._features(model)
        trained = time.perf_counter() - began
        found = ridge(self.stream, features, self.options.random_features, self.seed)
        return found | {"seconds": trained + found["seconds"]}

    def _train(self, model: Any, step: int) -> None:
        """Some epochs on the images of a step, each in a view of its own."""
        train, optim = self.config.train, self.config.optim
        rows = torch.cat([self.stream.rows[step], self.stream.kept[step]])
        batch = min(train.batch_size, len(rows))
        per_epoch, done = len(rows) // batch, 0
        total = per_epoch * self.options.block_epochs
        warmup = min(optim.warmup_steps, total // 5)
        optim = type(optim)(**{**vars(optim), "warmup_steps": warmup})
        optimizer = build_optimizer(model, optim)
        one_step = TrainingStep(
            model, optimizer, self.config.balance, train.label_smoothing, optim.clip_norm, train.precision
        )
        model.train()
        for _ in range(self.options.block_epochs):
            # Whole batches alone: another size would be compiled anew.
            order = rows[torch.randperm(len(rows))][: per_epoch * batch]
            for images, labels_B in self.bank.batches("train", batch, order, view=self.view):
                set_learning_rate(optimizer, done, total, optim)
                one_step(images, labels_B, warmup=False)
                done += 1
            self.view += 1

    @torch.no_grad()
    def _score(self, model: Any, step: int) -> list[float]:
        model.eval()
        seen = self.stream.seen(step)
        rows, columns = self.stream.among("test", seen), torch.tensor(seen, device=self.device)
        batches = self.bank.batches("test", self.bank.evaluation_batch, rows)
        logits = [model(images)[0][:, columns] for images, _ in batches]
        return by_step(self.stream, step, named(torch.cat(logits), seen), rows)

    @torch.no_grad()
    def _features(self, model: Any) -> SimpleNamespace:
        """What the head reads of all images, one view of the training images as they are."""
        model.eval()
        read: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].half()))

        def whole(split: str) -> tuple[Tensor, Tensor]:
            read.clear()
            labels = []
            for images, labels_B in self.bank.batches(split, self.bank.evaluation_batch):
                model(images)
                labels.append(labels_B)
            return torch.cat(read), torch.cat(labels)

        train, validation, test = (whole(split) for split in ("train", "validation", "test"))
        hook.remove()
        groups = len(self.config.backbone.features)
        return SimpleNamespace(
            train_VNF=train[0][None], labels_N=train[1], validation=validation, test=test, groups=groups
        )
