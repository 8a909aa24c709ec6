"""The measurements of benchmarks.devices with a ViT, in one of several processes."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from assembly.pipeline import Inputs, build_bank
from benchmarks.common import HEAD_RECIPE, synchronise
from benchmarks.processes import exchange_of, link_of, work
from benchmarks.runs import trained_run
from common.distributed import world
from common.errors import exit_code_of
from config.command_line import parse_command_line
from config.config import Config
from data.image_set import ImageSet, Splits
from model.backbone import load_backbone
from training.step import StepResult
from training.trainer import Trainer

CLASSES = 100
NAMES = ("images", "extracted", "epochs", "views")
BLOCKS = "--router.warmup_steps 20 --train.all_patches 0 --train.save_every 1000000 --backbone.pretrained false"
TINY_BLOCKS = "--config configs/digits_blocks.yaml --train.batch_size 24 --router.warmup_steps 1"
HEAD = f"--config {HEAD_RECIPE} --backbone.pretrained false"
TINY_HEAD = "--config configs/digits.yaml --features.views 2 --augment.flip true"
PROFILED, PROFILED_TINY = 10, 2  # steps with timed exchanges, after half as many warm-up steps


def main() -> None:
    work(NAMES, SECTIONS)


def _config(words: str, epochs: int) -> Config:
    return parse_command_line([*words.split(), "--train.epochs", str(epochs), "--tracking", "none"]).config


def _inputs(config: Config, images: int, device: torch.device) -> Inputs:
    """Random images: the requested number for training, and a few for the other splits."""

    def images_of(count: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        pixels_NCHW = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        names = tuple(map(str, range(CLASSES)))
        return ImageSet(pixels_NCHW, torch.randint(0, CLASSES, (count,), generator=generator), names)

    torch.manual_seed(0)  # weights that are the same in all processes
    splits = Splits(images_of(images, 0), images_of(100, 1), images_of(100, 2))
    return Inputs(device, splits, load_backbone(config.backbone, device, lambda: True))


def training(options: argparse.Namespace, device: torch.device, batch_of: Callable[[int], int]) -> dict:
    """Images/s of the median epoch after the first one, which compiles and captures; time of a step and its parts.

    batch_of: maps the recipe's images per step to those of this run. `trained`: number of parameters; `gates`: number
    of gate outputs per image.
    """
    config = _config(TINY_BLOCKS if options.tiny else BLOCKS, options.epochs)
    batch = config.train.batch_size = batch_of(config.train.batch_size)
    with trained_run(config, _inputs(config, options.images, device)) as (trainer, _):
        lines = trainer.run.history()[1:] if world().first else []
        found = {name: median(line[name] for line in lines) for name in lines[0] if "speed/" in name} if lines else {}
        found = world().broadcast(found)
        once = _step_of(trainer, batch)
        steps = PROFILED_TINY if options.tiny else PROFILED
        for _ in range(steps // 2):
            result = once()
        exchange = exchange_of(once, device, steps) if world().several else {}
        trainer.release_graphs()
        trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
        router = trainer.model.mixtures[0].router
        rows = float(result.assignments) / router.experts_per_sample / batch
    speed = found["speed/images_per_second"]
    return {
        "images_per_second": speed,
        "batch": batch,
        "seconds": batch / speed,
        "peak_gib": found.get("speed/peak_memory_gib"),
        "trained": trained,
        "gates": rows * len(router.work),
        **exchange,
    }


def _step_of(trainer: Trainer, batch: int) -> Callable[[], StepResult]:
    """Runs training steps like the trainer, on one batch after another."""
    config, shares = trainer.config, trainer.shares
    forward = {"patch_dropout": config.patch_dropout} if config.patch_dropout else {}
    order_N = torch.arange(len(trainer.bank.splits.train) // batch * batch)

    def endless() -> Iterator[tuple]:
        while True:
            yield from shares.batches(trainer.bank, batch, order_N, 0)

    batches = endless()
    trainer.model.train()

    def once() -> StepResult:
        features, labels_B, share = next(batches)
        return trainer.train_step(features, labels_B, False, **forward, **({} if share is None else {"share": share}))

    return once


def extraction(options: argparse.Namespace, device: torch.device) -> dict:
    """Images/s of the median view, without the first one, written to a file."""
    config = _config(TINY_HEAD if options.tiny else HEAD, options.epochs)
    inputs, seconds = _inputs(config, options.extracted, device), []
    with tempfile.TemporaryDirectory() as folder:
        config.features.cache_dir = Path(world().broadcast(folder))
        config.features.views = options.views
        bank = build_bank(config, inputs.splits, inputs.backbone, device)
        for view in range(options.views):
            world().wait()
            synchronise(device)
            began = time.perf_counter()
            next(bank.batches("train", 1, torch.tensor([0]), view=view))
            synchronise(device)
            seconds.append(time.perf_counter() - began)
            if bank.cache is not None:
                bank.cache.wait()
        world().wait()
        each = torch.Size(bank.feature_shape).numel() * 2
    seconds = [max(alike) for alike in zip(*world().gather(seconds), strict=True)]
    middle = median(seconds[1:])
    return {
        "images_per_second": options.extracted / middle,
        "seconds": middle,
        "views": seconds,
        "batch": config.features.batch_size,
        "bytes": each,
    }


def link(options: argparse.Namespace, device: torch.device) -> dict:
    """Bytes per second that an all-reduce moves in and out of a device, and the seconds of an almost empty one."""
    size = 2**14 if options.tiny else 2**23

    def exchange(numbers: int) -> Callable[[], object]:
        values = torch.zeros(numbers, device=device)
        return lambda: dist.all_reduce(values)

    large, small = link_of(exchange, device, size)
    moved = 2 * 4 * size * (1 - 1 / world().size)
    return {"within": moved / max(large - small, 1e-9), "latency": small}


SECTIONS = {
    "training": lambda options, device: training(options, device, lambda batch: batch),
    "half": lambda options, device: training(options, device, lambda batch: batch // 2),
    "each": lambda options, device: training(options, device, lambda batch: batch * world().size),
    "extraction": extraction,
    "link": link,
}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
