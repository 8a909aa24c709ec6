"""What benchmarks.devices measures, in one of several processes that torchrun has started."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from assembly.pipeline import Inputs, build_bank, build_model, compile_blocks, pick_device
from benchmarks.common import HEAD_RECIPE, synchronise
from benchmarks.runs import trained_run
from common.distributed import joined, started, world
from common.errors import exit_code_of
from config.command_line import parse_command_line
from config.config import Config
from data.image_set import ImageSet, Splits
from features.images import ImageBank
from model import distributed
from model.backbone import load_backbone
from training.optim import build_optimizer
from training.parallel import Shares
from training.step import TrainingStep

CLASSES = 100
BLOCKS = "--router.warmup_steps 20 --train.all_patches 0 --train.save_every 1000000 --backbone.pretrained false"
TINY_BLOCKS = "--config configs/digits_blocks.yaml --train.batch_size 24 --router.warmup_steps 1"
HEAD = f"--config {HEAD_RECIPE} --backbone.pretrained false"
TINY_HEAD = "--config configs/digits.yaml --features.views 2 --augment.flip true"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("images", "epochs", "steps", "views"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with started():
        device = pick_device(options.device)
        with joined(device):
            blocks, head = (TINY_BLOCKS, TINY_HEAD) if options.tiny else (BLOCKS, HEAD)
            found = {
                "training": training(_config(blocks, options.epochs), options.images, device),
                "step": step(_config(blocks, options.epochs), options.images, device, options.steps),
                "extraction": extraction(_config(head, options.epochs), options.images, device, options.views),
            }
            if world().first:
                options.out.write_text(json.dumps(found), encoding="utf-8")


def _config(words: str, epochs: int) -> Config:
    return parse_command_line([*words.split(), "--train.epochs", str(epochs), "--tracking", "none"]).config


def _inputs(config: Config, images: int, device: torch.device) -> Inputs:
    """Random images, as many as asked for to train on and few others."""

    def images_of(count: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        pixels_NCHW = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        names = tuple(map(str, range(CLASSES)))
        return ImageSet(pixels_NCHW, torch.randint(0, CLASSES, (count,), generator=generator), names)

    torch.manual_seed(0)  # weights that are the same in all processes
    splits = Splits(images_of(images, 0), images_of(100, 1), images_of(100, 2))
    return Inputs(device, splits, load_backbone(config.backbone, device, lambda: True))


def training(config: Config, images: int, device: torch.device) -> float:
    """Images a second of the median epoch after the first, which compiles."""
    with trained_run(config, _inputs(config, images, device)) as (trainer, _):
        found = [line["speed/images_per_second"] for line in trainer.run.history()[1:]]
    return world().broadcast(median(found) if world().first else 0.0)


def step(config: Config, images: int, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of a step, means over steps and processes: whole, and its compute, exchange and waiting."""
    inputs = _inputs(config, images, device)
    bank = ImageBank(inputs.splits, config.augment, device, config.features.batch_size)
    torch.manual_seed(0)
    model = build_model(config, bank.feature_shape, CLASSES, inputs.backbone).to(device).train()
    compile_blocks(config, model, device)
    optim = config.optim
    run = TrainingStep(model, build_optimizer(model, optim), config.balance, 0.1, optim.clip_norm, "auto")
    forward = {"patch_dropout": config.train.patch_dropout} if config.train.patch_dropout else {}
    shares, clock, whole = Shares(world(), 0, device), Clock(device), []
    order_N = torch.arange(images)[: images // config.train.batch_size * config.train.batch_size]
    done = 0
    with clock.watching():
        while done < steps + 10:  # the first ten compile, and warm up
            for features, labels_B, share in shares.batches(bank, config.train.batch_size, order_N, 0):
                clock.reset()
                synchronise(device)
                began = time.perf_counter()
                run(features, labels_B, False, share=share, **forward)
                synchronise(device)
                if (done := done + 1) > 10:
                    whole.append((time.perf_counter() - began, *clock.seconds()))
    each = torch.tensor(world().gather(whole)).mean(dim=(0, 1))
    seconds, waiting, exchange = each.tolist()
    return {"whole": seconds, "waiting": waiting, "exchange": exchange, "compute": seconds - waiting - exchange}


def extraction(config: Config, images: int, device: torch.device, views: int) -> float:
    """Images a second of the median view after the first, written to a file."""
    inputs, found = _inputs(config, images, device), []
    with tempfile.TemporaryDirectory() as folder:
        config.features.cache_dir = Path(world().broadcast(folder))
        config.features.views = views
        bank = build_bank(config, inputs.splits, inputs.backbone, device)
        for view in range(views):
            world().wait()
            synchronise(device)
            began = time.perf_counter()
            next(bank.batches("train", 1, torch.tensor([0]), view=view))
            synchronise(device)
            found.append(images / (time.perf_counter() - began))
            if bank.cache is not None:
                bank.cache.wait()
        world().wait()
    return world().broadcast(median(found[1:]))


class Clock:
    """Seconds that a process waits for others, and that it exchanges numbers with them, in the calls of a step."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.token = torch.zeros(1, device=device)

    def reset(self) -> None:
        self.marks.clear()

    def seconds(self) -> tuple[float, float]:
        """(waiting, exchange) since the last reset; the device has done all it was given."""
        if self.device.type == "cuda":
            spans = [(a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3) for a, b, c in self.marks]
        else:
            spans = [(b - a, c - b) for a, b, c in self.marks]
        return sum(span[0] for span in spans), sum(span[1] for span in spans)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every exchange is preceded by a small one, which takes as long as the last process lets it wait."""
        reduce, gather = dist.all_reduce, distributed._all_gather
        dist.all_reduce = self._watched(reduce, reduce)
        distributed._all_gather = self._watched(gather, reduce)
        try:
            yield
        finally:
            dist.all_reduce, distributed._all_gather = reduce, gather

    def _watched(self, exchange: Callable[..., Any], reduce: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            first = self._now()
            reduce(self.token, group=options.get("group"))
            second = self._now()
            found = exchange(*arguments, **options)
            self.marks.append((first, second, self._now()))
            return found

        return run

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
