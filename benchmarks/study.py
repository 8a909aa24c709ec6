"""Compare routing rules with dense heads on frozen features of CIFAR-100: tables, and a curve over the width.

python -m benchmarks.study --data.root DATA --backbone.weights FILE       all parts, at most 25 minutes on a GPU
python -m benchmarks.study --parts routers --seeds 3 ...                  one part, fewer seeds
python -m benchmarks.study --tiny                                         a quick trial on a CPU, with digits

routers: every rule that reads pooled features, and dense heads of equal active and of equal total size. tokens: Soft
MoE, which mixes patch tokens. widths: dense heads against mixtures of at most the same cost per sample, from 16 to 4096
hidden units. All heads read the class tokens and patch means of the last four blocks in eight views (logistic
regression: of the images without augmentation); `tokens` reads the last block's tokens in four views. Options of the
sections data, augment, backbone and features go to train.py's configuration.

Each method chooses learning rate and dropout on validation images among the same settings, with one seed. Then it is
trained with this choice and several seeds, and evaluated on the test images. Heads with the same seed see the same
batches. The validation images also select the router and the dense head that get more seeds. Finished runs are stored
in OUT, under a digest of their inputs, and are not repeated: an interrupted study can be continued.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from assembly.pipeline import build_bank
from benchmarks.common import Parser, environment, header, start, table, write
from benchmarks.study_curve import draw_curve
from benchmarks.study_heads import (
    SETTINGS,
    Features,
    Job,
    family_and_width,
    grid,
    has_seed,
    router_methods,
    token_methods,
    totals,
    width_methods,
)
from benchmarks.study_runs import Results, Workers
from benchmarks.study_tables import best, preferred, rows, shown
from common.errors import exit_code_of
from common.network import reachable
from common.signals import stoppable
from config.command_line import parse_command_line
from config.config import Config
from data.datasets import load_splits
from data.image_set import Splits
from features.bank import FeatureBank
from model.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = [16, 32, 64, 128, 256, 512, 2048, 4096]
TINY = {"width": 8, "widths": [8, 64], "workers": 2, "seeds": 2, "more_seeds": 3, "epochs": 2}
SECTIONS = ("--data.", "--augment.", "--backbone.", "--features.")
SELECTION_SEED = 1000


@dataclass(frozen=True)
class Part:
    """features, views: inputs of its heads. methods: from the options and the features to heads by name.

    share: of the time, relative to the other parts. epochs: fraction of the epochs of the others.
    """

    features: tuple[str, ...]
    views: int
    methods: Callable[[argparse.Namespace, Features], dict[str, dict]]
    share: float = 1.0
    epochs: float = 1.0
    most_workers: int = 64


POOLED = tuple(f"{pool}:{block}" for pool in ("cls", "mean") for block in (-4, -3, -2, -1))
PARTS = {
    "routers": Part(POOLED, 8, lambda options, features: router_methods(options.width)),
    "widths": Part(POOLED, 8, lambda options, features: width_methods(options.widths, features.groups)),
    # A step on tokens costs ten times as much, saturates a GPU's memory bandwidth, and needs gigabytes of memory.
    "tokens": Part(
        ("tokens:-1",),
        4,
        lambda options, features: token_methods(options.width, features),
        share=0.3,
        epochs=1 / 3,
        most_workers=2,
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Run the requested parts in turn; each may use its share of the remaining time."""
    options, rest = arguments(argv)
    device = start(options)
    where = environment(device)
    end = time.perf_counter() + options.seconds
    read: dict[str, Features] = {}
    for index, name in enumerate(options.parts):
        part = PARTS[name]
        share = part.share / sum(PARTS[other].share for other in options.parts[index:])
        deadline = time.perf_counter() + share * (end - time.perf_counter())
        if index == 0 or part.features != PARTS[options.parts[index - 1]].features:
            read.clear()  # frees the memory for the next ones
            read |= load_features(configuration(part, options, rest), part.views, options, device)
        run_part(name, options, where, read, deadline)


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The study's options, and those for the configuration. Raises UserError for others."""
    parser = Parser("study", __doc__, seconds=1500, tiny=TINY)
    parser.allow_abbrev = False
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run (default: all)"
    )
    parser.add_argument("--width", type=int, default=256, help="hidden units of an expert of `routers` (default 256)")
    parser.add_numbers("--widths", WIDTHS, "units of `widths`")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method (default 10)")
    parser.add_argument(
        "--more-seeds", type=int, default=30, help="runs of the best router and dense head (default 30)"
    )
    parser.add_argument("--epochs", type=int, default=24, help="epochs of each run (default 24)")
    parser.add_argument("--workers", type=int, default=6, help="number of training processes (default 6)")
    parser.add_argument("--heads", type=int, default=10, help="heads that each process trains in one pass (default 10)")
    options, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") and not word.startswith(SECTIONS):
            parser.error(f"{word} is not an option of the study: its heads have their own settings")
    return options, rest


def configuration(part: Part, options: argparse.Namespace, rest: list[str]) -> Config:
    """The configuration of the features of a part; its head is not used."""
    recipe = ROOT / "configs" / ("digits.yaml" if options.tiny else "cifar100_head.yaml")
    tokens = part.features == PARTS["tokens"].features
    names = part.features
    if options.tiny:  # a ViT of two blocks
        names = dict.fromkeys(name.replace("-4", "-2").replace("-3", "-1") for name in names)
    words = ["--config", str(recipe), "--backbone.features", f"[{','.join(names)}]", "--balance.switch", "0"]
    words += ["--neck.kind", "tokens" if tokens else "pooled", "--router.hidden", "[]"]
    words += ["--router.kind", "soft_moe" if tokens else "noisy_topk"]
    # A study selects among methods, which needs more validation images than a finished recipe. The views are stored
    # here and not in the bank.
    words += ["--data.validation", "0.1", "--features.mode", "live", "--features.compile", "never"]
    return parse_command_line([*words, *rest]).config


def run_part(name: str, options: argparse.Namespace, where: dict, read: dict[str, Features], deadline: float) -> None:
    """Select, train, score, print the table, write the JSON."""
    part = PARTS[name]
    options = argparse.Namespace(**{**vars(options), "epochs": max(1, round(part.epochs * options.epochs))})
    methods = part.methods(options, read["test"])
    results = Results(options.out / f"study_{name}{'_tiny' if options.tiny else ''}_{read['test'].digest}")
    with Workers(min(options.workers, part.most_workers), options.heads, read) as workers:
        chosen = select(methods, options, results, workers, deadline)
        jobs = [job for seed in range(options.seeds) for job in finals(chosen, seed, options)]
        workers.run(jobs, results, deadline)
        more, top = [], best(chosen) if name == "routers" else {}
        for seed in range(options.more_seeds if top else 0):
            more += finals({method: chosen[method] for method in top.values()}, seed, options)
        workers.run(more, results, deadline)
    report(name, options, where, results, (jobs, more), chosen, top)


def load_features(config: Config, views: int, options: argparse.Namespace, device) -> dict[str, Features]:
    """The same training views with the validation images, for selection, and with the held-out test images."""
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device, reachable)
    bank = build_bank(config, splits, backbone, device)
    views = min(views, options.epochs) if config.augment.active else 1
    train_VNF, labels_N = whole(bank, "train", range(views)), splits.train.labels_N.to(device)
    common = {
        "plain_NF": whole(bank, "train", [None])[0] if train_VNF.ndim == 3 else None,
        "groups": len(config.backbone.features),
        "classes": splits.train.num_classes,
        "digest": digest(config, splits, backbone.fingerprint(), views),
    }
    found = {
        stage: Features(train_VNF, labels_N, whole(bank, name, [None])[0], splits[name].labels_N.to(device), **common)
        for stage, name in (("selection", "validation"), ("test", "test"))
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def digest(config: Config, splits: Splits, backbone: str, views: int) -> str:
    """Eight digits that identify the inputs and the training of heads, apart from their own settings."""
    data = [splits[name].fingerprint() for name in ("train", "validation", "test")]
    parts = [data, backbone, vars(config.augment), views, SETTINGS]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def whole(bank: FeatureBank, split: str, views: Sequence[int | None]) -> torch.Tensor:
    """All features of a split in these views, where None means the original images: (V, N, ...)."""
    dtype = torch.float16 if bank.device.type == "cuda" else torch.float32
    shape = (len(views), len(bank.splits[split]), *bank.feature_shape)
    found = torch.empty(shape, dtype=dtype, device=bank.device)
    for place, view in enumerate(views):
        begun = 0
        for features_B, _ in bank.batches(split, 4096, view=view):
            found[place, begun : begun + len(features_B)] = features_B
            begun += len(features_B)
    return found


def select(
    methods: dict[str, dict], options: argparse.Namespace, results: Results, workers: Workers, deadline: float
) -> dict[str, dict]:
    """Each method with the settings of its best validation macro-F1, without methods that failed with all settings."""
    candidates = {
        name: [Job(name, head, SELECTION_SEED, "selection", options.epochs, settings) for settings in grid(head)]
        for name, head in methods.items()
    }
    workers.run([job for jobs in candidates.values() for job in jobs], results, deadline)
    chosen = {}
    for name, jobs in candidates.items():
        scored = [job for job in jobs if job.key in results.scores]
        if scored and all(
            map(results.knows, jobs)
        ):  # with fewer settings its search budget would differ from the others
            top = max(scored, key=lambda job: results.scores[job.key]["macro_f1"])
            score = results.scores[top.key]["macro_f1"]
            chosen[name] = {"head": top.head, "settings": top.settings, "validation": score}
    return chosen


def finals(chosen: dict[str, dict], seed: int, options: argparse.Namespace) -> list[Job]:
    """The runs of each method for the test images; logistic regression has no seed and a single run."""
    return [
        Job(name, choice["head"], seed, "test", options.epochs, choice["settings"])
        for name, choice in chosen.items()
        if seed == 0 or has_seed(choice["head"])
    ]


def report(
    name: str,
    options: argparse.Namespace,
    where: dict,
    results: Results,
    jobs: tuple[list[Job], list[Job]],
    chosen: dict,
    top: dict[str, str],
) -> None:
    """Print the tables, write everything as JSON, and draw the curve."""
    print(header(f"Heads on frozen features, test scores, paired with a dense head: {name}", where))
    partner = {method: choice["head"].get("against") for method, choice in chosen.items()}
    total = totals({method: choice["head"] for method, choice in chosen.items()})
    seedless = [method for method, choice in chosen.items() if not has_seed(choice["head"])]
    found = rows(*runs_of(jobs[0], results, options.seeds), partner, total, seedless)
    if name == "widths":
        found.sort(key=lambda row: family_and_width(row["method"])[1])
    print(table(*shown(found)))
    settled = rows(*runs_of(jobs[1], results, options.more_seeds), {top["router"]: top["dense"]}) if top else []
    if settled:
        print("\nThe router and the dense head with the best validation scores:\n")
        print(table(*shown(settled)))
    for key, reason in results.failed.items():
        job = json.loads(key)
        print(f"- {job['method']}, {job['stage']}, seed {job['seed']}, {job['settings']}: {reason}")
    settings = {"epochs": options.epochs, **SETTINGS}
    write(options, f"study_{name}", where, rows=found, settled=settled, chosen=chosen, settings=settings)
    suffix = "_tiny" if options.tiny else ""
    if name == "widths" and found:
        print(f"written to {draw_curve(found, preferred(chosen), options.out / f'study_widths{suffix}.png')}")


def runs_of(jobs: list[Job], results: Results, seeds: int) -> tuple[dict, dict]:
    """Scores and routings by method and seed. A method without a seed is paired with every seed of the others."""
    runs: dict[str, dict[int, dict]] = {}
    routings: dict[str, dict[int, np.ndarray]] = {}
    for job in jobs:
        if job.key in results.scores:
            for seed in [job.seed] if has_seed(job.head) else range(seeds):
                runs.setdefault(job.method, {})[seed] = results.scores[job.key]
            routings.setdefault(job.method, {})[job.seed] = results.routings[job.key]
    return runs, routings


def program() -> None:
    """`main`, with an orderly shutdown on a signal, workers first."""
    with stoppable():
        main()


if __name__ == "__main__":
    sys.exit(exit_code_of(program))
