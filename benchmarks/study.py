"""Routing rules against dense heads, on frozen features of CIFAR-100: tables, and a curve over the width.

python -m benchmarks.study --data.root DATA --backbone.weights FILE       all parts, at most 25 minutes on a GPU
python -m benchmarks.study --parts routers --seeds 3 ...                  one of them, fewer seeds
python -m benchmarks.study --tiny                                         a rehearsal on a CPU, with digits

routers: every rule that reads pooled features, and dense heads of equal active and of equal total size. tokens: Soft
MoE, which mixes patch tokens. widths: dense heads against mixtures that cost a sample no more, from 16 to 4096 hidden
units. All read the class tokens and patch means of the last four blocks in eight views, `tokens` the last block's
tokens in four; options that are none of those below go to train.py's configuration, which is configs/cifar100.yaml.

Each method chooses learning rate and dropout on validation images among the same settings, with one seed; then it is
trained with its choice from several seeds, and scored on the test images. Heads of one seed see the same batches.
Finished runs are kept in OUT and not done again: an interrupted study goes on.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Parser, environment, header, start, table, write
from benchmarks.study_curve import draw_curve
from benchmarks.study_heads import Features, Job, grid, router_methods, token_methods, width_methods
from benchmarks.study_runs import Results, Workers
from benchmarks.study_tables import COLUMNS, cells, rows
from data.datasets import load_splits
from engine.config import parse_command_line
from engine.pipeline import build_bank
from errors import exit_code_of
from model.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
POOLED = [f"{pool}:{block}" for pool in ("cls", "mean") for block in (-4, -3, -2, -1)]
READS = {"routers": (POOLED, 8), "widths": (POOLED, 8), "tokens": (["tokens:-1"], 4)}  # features, views


def main(argv: list[str] | None = None) -> None:
    """Run the parts that are asked for, in turn."""
    parser = Parser("study", __doc__, seconds=1500)
    parser.allow_abbrev = False
    parser.add_argument("--parts", nargs="+", choices=list(READS), default=list(READS), help="default: all")
    parser.add_argument("--width", type=int, default=256, help="hidden units of an expert of `routers` (default 256)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="active hidden units of `widths`")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method (default 10)")
    parser.add_argument("--more-seeds", type=int, default=30, help="of the best router and the best dense head")
    parser.add_argument("--epochs", type=int, default=32, help="of each run (default 32)")
    parser.add_argument("--workers", type=int, default=6, help="heads that train at once (default 6)")
    options, rest = parser.parse_known_args(argv)
    if options.tiny:
        options.width, options.widths, options.workers = 8, [8, 64], 2
        options.seeds, options.more_seeds, options.epochs = 2, 3, 2
    device = start(options)
    where = environment(device)
    deadline = time.perf_counter() + options.seconds
    read: dict[str, Features] = {}
    reads = None
    for part in options.parts:
        if READS[part] != reads:
            reads = READS[part]
            read.clear()  # before the next ones need the memory
            read |= load_features(options, rest, device, *reads)
        run_part(part, options, where, read, deadline)


def run_part(part: str, options: argparse.Namespace, where: dict, read: dict[str, Features], deadline: float) -> None:
    """Select, train, score, print the table, write the JSON."""
    methods = methods_of(part, options, read["test"].groups)
    results = Results(options.out / f"study_{part}{'_tiny' if options.tiny else ''}")
    with Workers(options.workers, read) as workers:
        chosen = select(methods, options, results, workers, deadline)
        jobs = [final(name, chosen[name], seed, options) for seed in range(options.seeds) for name in chosen]
        workers.run(jobs, results, deadline)
        if part == "routers":
            top = best(results, jobs)
            jobs += [final(name, chosen[name], seed, options) for seed in range(options.more_seeds) for name in top]
            workers.run(jobs, results, deadline)
    report(part, options, where, results, jobs, chosen)


def methods_of(part: str, options: argparse.Namespace, groups: int) -> dict[str, dict]:
    """The heads of a part, by name."""
    if part == "routers":
        return router_methods(options.width)
    if part == "tokens":
        return token_methods(options.width)
    return {name: head for width in options.widths for name, head in width_methods(width, groups).items()}


def load_features(
    options: argparse.Namespace, rest: list[str], device: torch.device, names: list[str], views: int
) -> dict[str, Features]:
    """The same training views with the validation images, for selection, and with the test images held out."""
    recipe = ROOT / "configs" / ("digits.yaml" if options.tiny else "cifar100.yaml")
    tokens = names == READS["tokens"][0]
    words = ["--config", str(recipe), "--neck.kind", "tokens" if tokens else "pooled"]
    words += ["--router.kind", "soft_moe" if tokens else "noisy_topk", "--balance.switch", "0"]
    # A study selects, and needs more validation images for it than a recipe that has been selected. The views are
    # kept here and not in the bank.
    words += ["--data.validation", "0.1", "--features.mode", "live", "--features.compile", "never"]
    names = [name.replace("-4", "-2").replace("-3", "-1") for name in names] if options.tiny else names
    words += ["--backbone.features", f"[{','.join(dict.fromkeys(names))}]"]
    config = parse_command_line([*words, *rest]).config
    splits = load_splits(config.data)
    bank = build_bank(config, splits, load_backbone(config.backbone, device), device)
    views = min(views, options.epochs) if config.augment.active else 1
    shape, dtype = bank.feature_shape, torch.float16 if device.type == "cuda" else torch.float32

    def whole(split: str, number: int) -> torch.Tensor:
        found = torch.empty(number, len(splits[split]), *shape, dtype=dtype, device=device)
        for view in range(number):
            begun = 0
            for features_B, _ in bank.batches(split, 4096, view=view if split == "train" else None):
                found[view, begun : begun + len(features_B)] = features_B
                begun += len(features_B)
        return found

    train_VNF, labels_N = whole("train", views), splits.train.labels_N.to(device)
    common = {"groups": len(config.backbone.features), "classes": splits.train.num_classes}
    return {
        stage: Features(train_VNF, labels_N, whole(name, 1)[0], splits[name].labels_N.to(device), **common)
        for stage, name in (("selection", "validation"), ("test", "test"))
    }


def select(
    methods: dict[str, dict], options: argparse.Namespace, results: Results, workers: Workers, deadline: float
) -> dict[str, dict]:
    """Each method with the settings of its best validation macro-F1."""
    candidates = {
        name: [Job(name, head, 1000, "selection", options.epochs, settings) for settings in grid(head)]
        for name, head in methods.items()
    }
    workers.run([job for jobs in candidates.values() for job in jobs], results, deadline)
    chosen = {}
    for name, jobs in candidates.items():
        done = [job for job in jobs if job.key in results.scores]
        if len(done) == len(jobs):  # with fewer, its budget would not have been that of the others
            top = max(done, key=lambda job: results.scores[job.key]["macro_f1"])
            chosen[name] = {"head": top.head, "settings": top.settings}
    return chosen


def final(name: str, chosen: dict, seed: int, options: argparse.Namespace) -> Job:
    """A run that the test images score."""
    return Job(name, chosen["head"], seed, "test", options.epochs, chosen["settings"])


def best(results: Results, jobs: list[Job]) -> list[str]:
    """The method of the highest mean macro-F1 among the dense ones, and among the others."""
    by_method: dict[str, list[float]] = {}
    for job in jobs:
        if job.key in results.scores:
            by_method.setdefault(job.method, []).append(results.scores[job.key]["macro_f1"])
    means = {name: float(np.mean(values)) for name, values in by_method.items()}
    dense = {name for name in means if name.startswith("dense")}
    means = {name: mean for name, mean in means.items() if name not in ("logistic regression", "linear head")}
    return [max(group, key=means.get) for group in (dense, means.keys() - dense) if group]


def report(
    part: str, options: argparse.Namespace, where: dict, results: Results, jobs: list[Job], chosen: dict
) -> None:
    """The table on the screen, everything as JSON, and the curve as a picture."""
    runs: dict[str, dict[int, dict]] = {}
    routings: dict[str, dict[int, np.ndarray]] = {}
    for job in jobs:
        if job.key in results.scores:
            runs.setdefault(job.method, {})[job.seed] = results.scores[job.key]
            routings.setdefault(job.method, {})[job.seed] = results.routings[job.key]
    title = f"Heads on frozen features, test macro-F1, paired with the dense head of equal cost: {part}"
    print(header(title, where))
    widths = options.widths if part == "widths" else [None]
    found = []
    for width in widths:
        names = [name for name in runs if width is None or name.endswith(f" {width}")]
        dense = [name for name in names if name.startswith("dense")]
        if dense:
            found += rows({name: runs[name] for name in names}, routings, against=dense[0])
    print(table(COLUMNS, [cells(row) for row in found]))
    if part == "widths" and found:
        print(f"written to {draw_curve(found, results.path.with_name('widths.png'))}")
    write(options, f"study_{part}", where, rows=found, chosen=chosen, settings={"epochs": options.epochs})


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
