"""Class-incremental learning: how well a frozen ViT with simple heads, a dense head, and mixtures remember old classes.

python -m benchmarks.incremental --data.root DATA --backbone.weights FILE             10 steps of 10 classes, on a GPU
python -m benchmarks.incremental --steps 5 --memory 20 --data.root DATA --backbone.weights FILE
python -m benchmarks.incremental --tiny                                               a quick trial on digits, CPU

Options that are not listed below go to train.py's configuration. After each step the predictions on the test images of
all classes seen so far are scored, and also those on validation images, for choosing among methods. Each result is a
line of incremental.jsonl in --out; finished results are not repeated, so an interrupted run can continue. If a method
fails, it reports the reason, and the others continue. Methods:

ncm            nearest class mean on normalised features
ridge          ridge regression onto the classes, from running sums that each step adds to
ridge_random   the same on a random projection of the features (RanPAC, McDonnell 2023)
dense          one dense head, trained on each step's images
mixture        a mixture that gets new experts in each step, the old ones frozen
dense_drawn, mixture_drawn     the same, plus features drawn around the mean of each old class with a common covariance
blocks         the default recipe, experts inside the ViT, trained on each step's images
first_*        these experts trained only on the first step, then, on their features:
first_ridge    ridge_random
first_both     ridge_random, with the features of the frozen ViT in addition
first_drawn    mixture_drawn
"""

import argparse
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from assembly.pipeline import build_bank
from benchmarks.common import (
    HEAD_RECIPE,
    Failure,
    Limit,
    Parser,
    append_line,
    attempt,
    environment,
    header,
    read_lines,
    start,
    table,
)
from benchmarks.incremental_data import Data
from benchmarks.incremental_heads import Heads
from benchmarks.incremental_ridge import class_means, ridge
from benchmarks.incremental_scores import Stream, summary
from benchmarks.incremental_vit import Inside
from common.errors import UserError, exit_code_of, say
from common.network import reachable
from config.command_line import DEFAULT_CONFIG, parse_command_line
from config.config import Config
from data.datasets import load_splits
from data.image_set import Splits
from features.bank import FeatureBank
from model.backbone import load_backbone

ON_FROZEN = ("ncm", "ridge", "ridge_random", "dense", "mixture", "dense_drawn", "mixture_drawn")
INSIDE = ("first_ridge", "first_both", "first_drawn", "blocks")
METHODS = ON_FROZEN + INSIDE
TINY = ["--config", "configs/digits.yaml", "--data.max_per_class", "20", "--neck.kind", "pooled"]
TINY += ["--backbone.features", "[cls:1,mean:1]", "--train.batch_size", "32"]
TINY_BLOCKS = ["--config", "configs/digits_blocks.yaml", "--data.max_per_class", "20", "--train.batch_size", "32"]
WITHOUT_MEMORY = ("ncm", "ridge", "ridge_random", "dense_drawn", "mixture_drawn", *INSIDE[:3])
"""Methods that store sums over all old images, and therefore need no old images."""


def main(argv: list[str] | None = None) -> None:
    """Train the missing methods, and print the table."""
    tiny = {"steps": 5, "views": 1, "random_features": 64, "epochs": 2, "block_epochs": 1, "first_epochs": 2}
    parser = Parser("incremental", __doc__, seconds=900, tiny=tiny)
    parser.allow_abbrev = False
    parser.add_argument("--steps", type=int, default=10, help="number of steps (default 10)")
    parser.add_argument(
        "--memory", type=int, default=0, least=0, metavar="N", help="old images kept per class (default 0)"
    )
    parser.add_numbers("--seeds", [0], "seeds of weights and batches", least=0)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run (default: all)"
    )
    parser.add_argument("--views", type=int, default=4, metavar="N", help="augmented views of each image (default 4)")
    parser.add_argument(
        "--random_features",
        type=int,
        default=16384,
        metavar="N",
        help="random features of ridge_random (default 16384)",
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a head in each step (default 10)")
    parser.add_argument("--block_epochs", type=int, default=4, help="epochs of blocks in each step (default 4)")
    parser.add_argument("--first_epochs", type=int, default=10, help="epochs of first_* in the first step (default 10)")
    options, rest = parser.parse_known_args(argv)
    limit = Limit(options.seconds)
    device = start(options)
    where = environment(device)
    done = read(options.out, tiny=options.tiny)
    todo = [(seed, name) for seed in options.seeds for name in options.methods if key(options, seed, name) not in done]
    head = parse_command_line(head_words(options, rest)).config
    inside = TINY_BLOCKS if options.tiny else ["--config", str(DEFAULT_CONFIG)]
    inside = parse_command_line([*inside, *rest, "--data.validation", "0.1"]).config
    if todo:
        splits = load_splits(head.data)
        if splits.train.num_classes % options.steps:
            raise UserError(f"--steps {options.steps} does not divide the {splits.train.num_classes} classes")
        stream = Stream.of(splits, options.steps, options.memory)
        work = Work(options, limit, device, stream, splits, head, inside)
        for seed, name in todo:
            work.do(seed, name)
        done = read(options.out, tiny=options.tiny)
    rows = [row for row in done.values() if row["steps"] == options.steps]
    if not options.tiny:
        print(header(f"Classes in {options.steps} steps: accuracy on the test images of all classes so far", where))
    print(table(*summary(rows)))


def head_words(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The command line of a head. Its features are stored on disk only if `rest` names a folder for them."""
    recipe = TINY if options.tiny else ["--config", str(HEAD_RECIPE)]
    held = ["--data.validation", "0.1", "--features.views", str(options.views)]
    return [*recipe, "--features.cache_dir", "null", *rest, *held]


class Work:
    """Runs methods. Shared inputs are computed once, at their first use."""

    def __init__(
        self,
        options: argparse.Namespace,
        limit: Limit,
        device: torch.device,
        stream: Stream,
        splits: Splits,
        head: Config,
        inside: Config,
    ):
        self.options, self.limit, self.device, self.stream, self.splits = options, limit, device, stream, splits
        self.configs = {"head": head, "inside": inside}
        self._first: dict[int, Data] = {}
        self._adapting = 0.0  # seconds spent on them

    def do(self, seed: int, name: str) -> None:
        """Run a method and append its result; a failure, or a lack of time, is reported in one line."""
        found = attempt(lambda: self._run(seed, name))
        if isinstance(found, Failure):
            say(f"{name}, seed {seed}: no result, {found.reason}")
            return
        found["seconds"] += self._adapting if name.startswith("first") else 0.0
        append(self.options, seed, name, found, environment(self.device))
        say(f"{name}, seed {seed}: mean {100 * found['mean']:.2f} %, {found['seconds']:.1f} s")

    def _run(self, seed: int, name: str) -> dict[str, Any]:
        self.limit.check()
        if name == "blocks":
            return self.inside.run(seed)
        if name == "ncm":
            return class_means(self.stream, self.frozen, self.limit)
        kind, _, way = name.rpartition("_")
        if name.startswith("first"):
            data = self.first(seed)
            data = self.frozen.beside(data) if way == "both" else data
            kind = "mixture"
        else:
            data = self.frozen
        if way in ("ridge", "random", "both"):
            random_features = 0 if name == "ridge" else self.options.random_features
            return ridge(self.stream, data, random_features, seed, self.limit)
        epochs, drawn = self.options.epochs, way == "drawn"
        config = self.configs["head"]
        return Heads(config, self.stream, data, seed, epochs, drawn, self.limit).run(kind or way)

    @cached_property
    def frozen(self) -> Data:
        """Features of the frozen ViT."""
        head = self.configs["head"]
        backbone = load_backbone(head.backbone, self.device, reachable)
        bank = build_bank(head, self.splits, backbone, self.device)
        assert isinstance(bank, FeatureBank)
        return Data.of(bank, self.options.views, len(head.backbone.features))

    @cached_property
    def inside(self) -> Inside:
        """The ViT with experts in its blocks."""
        return Inside(self.configs["inside"], self.splits, self.device, self.stream, self.options, self.limit)

    def first(self, seed: int) -> Data:
        """Features of the ViT whose experts were trained on the first step."""
        if seed not in self._first:
            inside, began = self.inside, time.perf_counter()
            self._first = {seed: inside.adapted(seed)}
            self._adapting = time.perf_counter() - began
        return self._first[seed]


def key(options: argparse.Namespace, seed: int, name: str) -> tuple:
    """The key of a result."""
    memory = 0 if name in WITHOUT_MEMORY else options.memory
    return (name, options.steps, memory, seed)


def append(options: argparse.Namespace, seed: int, name: str, found: dict[str, Any], where: dict[str, Any]) -> None:
    """Append a result to the file, which is never rewritten."""
    names = ("method", "steps", "memory", "seed")
    row = dict(zip(names, key(options, seed, name), strict=True)) | found | {"environment": where}
    append_line(file_of(options.out, options.tiny), row)


def file_of(out: Path, tiny: bool) -> Path:
    """The file of the results."""
    return out / f"incremental{'_tiny' if tiny else ''}.jsonl"


def read(out: Path, tiny: bool) -> dict[tuple, dict[str, Any]]:
    """The results so far, by key; a truncated line is left out."""
    names = ("method", "steps", "memory", "seed")
    return {tuple(row[name] for name in names): row for row in read_lines(file_of(out, tiny))}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
