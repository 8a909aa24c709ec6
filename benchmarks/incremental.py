"""Classes that come in steps: what a frozen ViT with a simple head, a dense head, and mixtures remember.

python -m benchmarks.incremental --data.root DATA --backbone.weights FILE             10 steps of 10 classes, on a GPU
python -m benchmarks.incremental --steps 5 --memory 20 --data.root DATA --backbone.weights FILE
python -m benchmarks.incremental --tiny                                               a rehearsal on a CPU, with digits

Options that are none of those below go to train.py's configuration. After each step the answers to the test images of
all classes seen so far are scored. Each result is a line of incremental.jsonl in --out; what is there already is not
done again, so that an interrupted run goes on. Methods:

ncm            nearest class mean on normalised features
ridge          ridge regression onto the classes, by sums that each step adds to
ridge_random   the same on a random projection of the features (RanPAC, McDonnell 2023)
dense          one dense head, trained on each step's images
mixture        a mixture that gets new experts in each step, the old ones frozen
dense_drawn, mixture_drawn     the same, beside features drawn from the mean of each old class and a common covariance
blocks         the default recipe, experts inside the ViT, trained on each step's images
blocks_ridge   those experts trained on the first step alone, then ridge_random on what they give
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from assembly.pipeline import build_bank
from benchmarks.common import HEAD_RECIPE, Parser, append_line, environment, header, read_lines, start, table
from benchmarks.incremental_heads import Heads
from benchmarks.incremental_ridge import class_means, ridge
from benchmarks.incremental_scores import Stream, summary
from benchmarks.incremental_vit import Inside
from common.errors import UserError, exit_code_of
from common.network import reachable
from config.command_line import DEFAULT_CONFIG, parse_command_line
from data.datasets import load_splits
from features.bank import FeatureBank
from model.backbone import load_backbone

METHODS = ("ncm", "ridge", "ridge_random", "dense", "mixture", "dense_drawn", "mixture_drawn", "blocks", "blocks_ridge")
TINY = ["--config", "configs/digits.yaml", "--data.max_per_class", "20", "--neck.kind", "pooled"]
TINY += ["--backbone.features", "[cls:1,mean:1]", "--train.batch_size", "32"]
TINY_BLOCKS = ["--config", "configs/digits_blocks.yaml", "--data.max_per_class", "20", "--train.batch_size", "32"]
WITHOUT_MEMORY = ("ncm", "ridge", "ridge_random", "dense_drawn", "mixture_drawn", "blocks_ridge")
"""Methods whose sums hold all of the old images anyway."""


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, print the table."""
    tiny = {"steps": 5, "views": 1, "random_features": 64, "epochs": 2, "block_epochs": 1, "seeds": [0]}
    parser = Parser("incremental", __doc__, seconds=900, tiny=tiny)
    parser.allow_abbrev = False
    parser.add_argument("--steps", type=int, default=10, help="steps that the classes come in (default 10)")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="old images kept of each class (default 0)")
    parser.add_numbers("--seeds", [0], "seeds of weights and batches")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which (default: all)")
    parser.add_argument("--views", type=int, default=4, metavar="N", help="augmented views of each image (default 4)")
    parser.add_argument(
        "--random_features", type=int, default=16384, metavar="N", help="of ridge_random (default 16384)"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of a head in each step (default 10)")
    parser.add_argument("--block_epochs", type=int, default=4, help="of the experts inside the ViT (default 4)")
    options, rest = parser.parse_known_args(argv)
    device = start(options)
    where = environment(device)
    done = read(options.out, tiny=options.tiny)
    todo = [(seed, name) for seed in options.seeds for name in options.methods if key(options, seed, name) not in done]
    held = ["--data.validation", "0.1", "--features.cache_dir", "null", "--features.views", str(options.views)]
    head = parse_command_line([*(TINY if options.tiny else ["--config", str(HEAD_RECIPE)]), *rest, *held]).config
    inside = TINY_BLOCKS if options.tiny else ["--config", str(DEFAULT_CONFIG)]
    inside = parse_command_line([*inside, *rest, "--data.validation", "0.1"]).config
    if todo:
        splits = load_splits(head.data)
        if splits.train.num_classes % options.steps:
            raise UserError(f"--steps {options.steps} does not divide the {splits.train.num_classes} classes")
        stream = Stream.of(splits, options.steps, options.memory)
        work(options, todo, device, stream, (head, inside), splits)
        done = read(options.out, tiny=options.tiny)
    rows = [row for row in done.values() if row["steps"] == options.steps]
    if not options.tiny:
        print(header(f"Classes in {options.steps} steps: accuracy on the test images of all classes so far", where))
    print(table(*summary(rows)))


def work(options: argparse.Namespace, todo: list, device: torch.device, stream: Stream, configs, splits) -> None:
    """Run what is missing, and append each result."""
    head, inside = configs
    names = {name for _, name in todo}
    data = None
    if names - {"blocks", "blocks_ridge"}:
        backbone = load_backbone(head.backbone, device, reachable)
        bank = build_bank(head, splits, backbone, device)
        assert isinstance(bank, FeatureBank)
        data = Data.of(bank, options.views, len(head.backbone.features))
    for seed in dict.fromkeys(seed for seed, _ in todo):
        within = Inside(inside, splits, device, stream, seed, options) if names & {"blocks", "blocks_ridge"} else None
        for name in [name for of, name in todo if of == seed]:
            if name.startswith("blocks"):
                found = within.run(name)
            elif name == "ncm":
                found = class_means(stream, data)
            elif name.startswith("ridge"):
                found = ridge(stream, data, options.random_features if name == "ridge_random" else 0, seed)
            else:
                kind, _, drawn = name.partition("_")
                found = Heads(head, stream, data, seed, options.epochs, bool(drawn)).run(kind)
            append(options, seed, name, found, environment(device))


class Data:
    """Features on the device: views (V, N, F) of the training images, and validation and test images as they are."""

    def __init__(self, train_VNF, labels_N, validation, test, groups: int):
        self.train_VNF, self.labels_N, self.validation, self.test, self.groups = (
            train_VNF,
            labels_N,
            validation,
            test,
            groups,
        )

    @classmethod
    def of(cls, bank: FeatureBank, views: int, groups: int) -> "Data":
        """Extract what the bank has. groups: equally wide features that a vector is made of."""

        def whole(split: str, view: int | None = None):
            features, labels = zip(*bank.batches(split, 1024, view=view), strict=True)
            return torch.cat(features), torch.cat(labels)

        parts = [whole("train", view if bank.augment.active else None) for view in range(views)]
        train_VNF = torch.stack([features for features, _ in parts])
        return cls(train_VNF, parts[0][1], whole("validation"), whole("test"), groups)


def key(options: argparse.Namespace, seed: int, name: str) -> tuple:
    """What one result is of."""
    memory = 0 if name in WITHOUT_MEMORY else options.memory
    return (name, options.steps, memory, seed)


def append(options: argparse.Namespace, seed: int, name: str, found: dict[str, Any], where: dict[str, Any]) -> None:
    """Add a result to the file, which is never rewritten."""
    names = ("method", "steps", "memory", "seed")
    row = dict(zip(names, key(options, seed, name), strict=True)) | found | {"environment": where}
    append_line(file_of(options.out, options.tiny), row)
    print(
        f"{name}, seed {seed}: mean {100 * found['mean']:.2f} %, {found['seconds']:.1f} s", file=sys.stderr, flush=True
    )


def file_of(out: Path, tiny: bool) -> Path:
    """The file of the results."""
    return out / f"incremental{'_tiny' if tiny else ''}.jsonl"


def read(out: Path, tiny: bool) -> dict[tuple, dict[str, Any]]:
    """The results so far, by what they are of; a truncated line is left out."""
    names = ("method", "steps", "memory", "seed")
    return {tuple(row[name] for name in names): row for row in read_lines(file_of(out, tiny))}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
