"""Routing rules against dense heads, on frozen features of CIFAR-100: one table, and a curve over the width.

python -m benchmarks.study --data.root DATA --backbone.weights FILE       routers: select on validation, then test
python -m benchmarks.study --part widths ...                              dense against mixtures of equal cost
python -m benchmarks.study --tiny                                         a rehearsal on a CPU, with digits

Options that are none of those below go to train.py's configuration, which is configs/cifar100.yaml: its features and
views are what every head reads. Each method chooses learning rate and weight decay on the validation images among the
same settings, with one seed; then it is trained with its choice from several seeds, and scored on the test images.
Heads of one seed see the same batches. Finished runs are kept in OUT and not done again: an interrupted study goes on.
"""

import argparse
import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from benchmarks.common import Parser, environment, header, start, table, write
from benchmarks.study_heads import Features, Job, grid, router_methods, train_head, width_methods
from benchmarks.study_tables import COLUMNS, cells, rows
from data.datasets import load_splits
from engine.config import parse_command_line
from engine.pipeline import build_bank
from errors import exit_code_of
from model.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def main(argv: list[str] | None = None) -> None:
    """Select, train, score, print the table, write the JSON."""
    parser = Parser("study", __doc__, seconds=1500)
    parser.allow_abbrev = False
    parser.add_argument("--part", choices=["routers", "widths"], default="routers", help="default routers")
    parser.add_argument("--width", type=int, default=256, help="hidden units of an expert of `routers` (default 256)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="active hidden units of `widths`")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method (default 10)")
    parser.add_argument("--more-seeds", type=int, default=30, help="of the best router and the best dense head")
    parser.add_argument("--epochs", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--workers", type=int, default=12, help="heads that train at once (default 12)")
    options, rest = parser.parse_known_args(argv)
    if options.tiny:
        options.width, options.widths, options.workers = 8, [8, 64], 2
        options.seeds, options.more_seeds, options.epochs = 2, 3, 2
    device = start(options)
    where = environment(device)
    methods = router_methods(options.width) if options.part == "routers" else {}
    for width in [] if methods else options.widths:
        methods |= width_methods(width)
    results = Results(options.out / f"study_{options.part}{'_tiny' if options.tiny else ''}")
    validation, test = load_features(options, rest, device)
    deadline = time.perf_counter() + options.seconds
    chosen = select(methods, options, results, validation, deadline)
    jobs = [final(name, chosen[name], seed, options) for seed in range(options.seeds) for name in chosen]
    run_all(jobs, results, test, options.workers, deadline)
    if options.part == "routers":
        more = [
            final(name, chosen[name], s, options) for s in range(options.more_seeds) for name in best(results, jobs)
        ]
        run_all(more, results, test, options.workers, deadline)
        jobs += more
    report(options, where, results, jobs, chosen)


def load_features(options: argparse.Namespace, rest: list[str], device: torch.device) -> tuple[Features, Features]:
    """The same training views with the validation images, and with the test images, held out."""
    recipe = ROOT / "configs" / ("digits.yaml" if options.tiny else "cifar100.yaml")
    # A study selects, and needs more validation images for it than a recipe that has been selected.
    words = ["--config", str(recipe), "--data.validation", "0.1", "--train.epochs", str(options.epochs)]
    if options.tiny:
        words += ["--backbone.features", "[cls:-1,mean:-1]", "--neck.kind", "pooled", "--router.warmup_steps", "0"]
    config = parse_command_line([*words, *rest]).config
    splits = load_splits(config.data)
    bank = build_bank(config, splits, load_backbone(config.backbone, device), device)
    views = range(min(config.features.views, options.epochs) if config.augment.active else 1)

    def whole(split: str, view: int | None = None) -> torch.Tensor:
        return torch.cat([features for features, _ in bank.batches(split, 4096, view=view)])

    train_VNF = torch.stack([whole("train", view) for view in views])
    common = {"groups": len(config.backbone.features), "classes": splits.train.num_classes}
    labels_N = splits.train.labels_N.to(device)
    return tuple(
        Features(train_VNF, labels_N, whole(name), splits[name].labels_N.to(device), **common)
        for name in ("validation", "test")
    )


class Results:
    """Finished jobs in DIR/runs.jsonl, and their routings beside it; what is there already is not done again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "runs.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.scores: dict[str, dict[str, Any]] = {}
        self.routings: dict[str, np.ndarray] = {}
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # torn by a kill: that run is done again
                continue
            self.scores[found["key"]] = found["scores"]
            self.routings[found["key"]] = np.array(found["first"], dtype=np.int16)

    def add(self, job: Job, scores: dict[str, Any], first_M: np.ndarray) -> None:
        """Keep a run."""
        self.scores[job.key], self.routings[job.key] = scores, first_M
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({"key": job.key, "scores": scores, "first": first_M.tolist()}))


def select(
    methods: dict[str, dict], options: argparse.Namespace, results: Results, features: Features, deadline: float
) -> dict[str, dict]:
    """Each method with the settings of its best validation macro-F1."""
    candidates = {
        name: [Job(name, head, 1000, "selection", options.epochs, optim) for optim in grid(head)]
        for name, head in methods.items()
    }
    run_all([job for jobs in candidates.values() for job in jobs], results, features, options.workers, deadline)
    chosen = {}
    for name, jobs in candidates.items():
        done = [job for job in jobs if job.key in results.scores]
        if len(done) == len(jobs):  # with fewer, its budget would not have been that of the others
            top = max(done, key=lambda job: results.scores[job.key]["macro_f1"])
            chosen[name] = {"head": top.head, "optim": top.optim}
    return chosen


def final(name: str, chosen: dict, seed: int, options: argparse.Namespace) -> Job:
    """A run that the test images score."""
    return Job(name, chosen["head"], seed, "test", options.epochs, chosen["optim"])


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


def run_all(jobs: list[Job], results: Results, features: Features, workers: int, deadline: float) -> None:
    """Train the heads that are not there yet, several at once on the same features in memory, until the deadline."""
    left = list({job.key: job for job in jobs if job.key not in results.scores}.values())
    if not left or time.perf_counter() > deadline:
        return
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for job in left:
        todo.put(job)
    processes = [context.Process(target=_work, args=(todo, done, features)) for _ in range(min(workers, len(left)))]
    for process in processes:
        process.start()
    finished = 0
    while finished < len(left) and time.perf_counter() < deadline and any(p.is_alive() for p in processes):
        try:
            job, outcome = done.get(timeout=1)
        except queue.Empty:
            continue
        finished += 1
        if isinstance(outcome, str):
            print(f"{job.method}, seed {job.seed}: {outcome}", file=sys.stderr)
        else:
            results.add(job, *outcome)
    for process in processes:
        process.terminate()
        process.join()


def _work(todo, done, features: Features) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            job = todo.get(timeout=1)
        except queue.Empty:
            return
        try:
            done.put((job, train_head(job, features)))
        except Exception as error:  # one head must not end the others
            done.put((job, " ".join(f"{type(error).__name__}: {error}".split())[:200]))


def report(options: argparse.Namespace, where: dict, results: Results, jobs: list[Job], chosen: dict) -> None:
    """The table on the screen, and everything as JSON."""
    runs: dict[str, dict[int, dict]] = {}
    routings: dict[str, dict[int, np.ndarray]] = {}
    for job in jobs:
        if job.key in results.scores:
            runs.setdefault(job.method, {})[job.seed] = results.scores[job.key]
            routings.setdefault(job.method, {})[job.seed] = results.routings[job.key]
    groups = (
        [list(runs)]
        if options.part == "routers"
        else [[n for n in runs if n.endswith(f" {w}")] for w in options.widths]
    )
    print(
        header(
            f"Heads on frozen features, test macro-F1, paired with the dense head of equal cost: {options.part}", where
        )
    )
    found = []
    for names in filter(None, groups):
        found += rows({n: runs[n] for n in names}, routings, against=next(n for n in names if n.startswith("dense")))
    print(table(COLUMNS, [cells(row) for row in found]))
    write(options, f"study_{options.part}", where, rows=found, chosen=chosen, settings={"epochs": options.epochs})


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
