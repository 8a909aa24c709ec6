"""The length of a training: steps per epoch, random warm-up steps, and expected time."""

import math
from dataclasses import replace

from common.errors import UserError, warn
from config.config import Config
from config.train import TrainConfig

DAY = 24 * 3600


def steps_per_epoch(config: TrainConfig, images: int) -> int:
    """Steps per epoch for a number of training images. Raises UserError for a batch larger than that."""
    if config.batch_size > images:
        raise UserError(f"train.batch_size {config.batch_size} is larger than the {images} training images: lower it")
    return math.ceil(images / config.batch_size)


def shorten_warmup(config: Config, images: int) -> Config:
    """The configuration with random routing in at most half of the steps; prints a line if that changes it.

    Raises UserError as `steps_per_epoch`.
    """
    steps = steps_per_epoch(config.train, images) * config.train.epochs
    if config.router.random_steps <= steps // 2:
        return config
    warn(
        f"router.warmup_steps {config.router.warmup_steps} is more than half of the {steps} steps: "
        f"only {steps // 2} steps route at random"
    )
    return replace(config, router=replace(config.router, warmup_steps=steps // 2))


def check_warmup(random_steps: int, steps: int) -> None:
    """Raise UserError if all steps would be routed at random."""
    if random_steps >= steps:
        raise UserError(
            f"router.warmup_steps {random_steps} routes all {steps} steps at random and never trains the gate: lower "
            "it, or raise train.epochs"
        )


class Pace:
    """Warns once if a training will take more than a day at its current speed."""

    def __init__(self, epochs: int, views: int):
        """epochs: of the whole training. views: first epochs that may be slower, because they extract features."""
        self.epochs, self.views, self.warned = epochs, views, False

    def check(self, epoch: int, seconds: float) -> None:
        """Call after each epoch with its seconds."""
        left = self.epochs - epoch if epoch >= self.views else self.views - epoch
        if self.warned or left * seconds < DAY:
            return
        self.warned = True
        warn(
            f"the remaining epochs will take {_long(left * seconds)} or more at {seconds:.1f} s per epoch: lower "
            "--train.epochs, or set --train.patience"
        )


def _long(seconds: float) -> str:
    return f"{seconds / DAY:,.0f} days" if seconds >= 2 * DAY else f"{seconds / 3600:.0f} hours"
