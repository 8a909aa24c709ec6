"""Seconds from uint8 arrays in memory to a test macro-F1: our recipes, one with a live backbone, and the article's.

python -m benchmarks.time_to_accuracy --data.root DATA --backbone.weights FILE     two epochs of the article
python -m benchmarks.time_to_accuracy --article-epochs 7 --seconds 900             until the article is at its best
python -m benchmarks.time_to_accuracy --tiny                                       a quick trial on a CPU, with digits

Our recipes are configs/cifar100_head.yaml and cifar100_fast.yaml, or the one that --config names; options that are not
listed below go to their configuration. The clock starts with images and backbone in memory, and stops when the
predictions on the test images are scored. Each run is written to the JSON file when it ends.

The article's recipe is written in the usual way: float32, the backbone in the loop, a DataLoader with batch 64, a loop
over the experts with masks. Its test score is measured after each epoch, off the clock.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from assembly.pipeline import build_model
from benchmarks.common import (
    Failure,
    Parser,
    Timing,
    attempt,
    environment,
    header,
    save,
    start,
    synchronise,
    table,
    write,
)
from benchmarks.layers import article_loop
from benchmarks.runs import train_once
from common.errors import exit_code_of
from common.network import reachable
from config.command_line import parse_command_line
from config.config import Config, config_from_dict
from data.datasets import load_splits
from data.image_set import Splits
from evaluation.metrics import scores
from model.backbone import Backbone, load_backbone
from model.losses.usage_variance import usage_variance
from storage.checkpoint import seed_everything

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ARTICLE = "article as written"

LIMITS = ["--data.name", "digits", "--data.max_per_class", "20"]
SMALL = ["--neck.heads", "3", "--experts.sizes", "[[8],[16]]", "--router.hidden", "[8]"]


def main(argv: list[str] | None = None) -> None:
    """Run every contestant, print the table, the curves and the ratio, write the JSON."""
    options, rest = arguments(argv)
    device = start(options)
    where = environment(device)
    recipes, article = configurations(options, rest)
    # One-time costs that should not be on any clock: imports, contexts, kernels.
    ours = next(iter(recipes.values()))
    splits, backbone = load_splits(ours.data), load_backbone(ours.backbone, device, reachable)
    warm_up(backbone, device)
    runs: dict[str, list] = {}
    configs = {name: recipe.to_dict() for name, recipe in recipes.items()}
    for name, run in contestants(recipes, article, splits, backbone, device, options):
        runs.setdefault(name, []).append(attempt(run))
        save(options, "time_to_accuracy", where, runs=runs, goal=goal(runs, recipes), configs=configs)
    print(header("Time from uint8 arrays to the test macro-F1", where))
    columns = ["contestant", "seconds (range)", "test macro-F1 (range)", "runs"]
    print(table(columns, [_line(name, found) for name, found in runs.items()]))
    for name, found in runs.items():
        for run in found:
            print(f"- {name}: {run.reason}" if isinstance(run, Failure) else f"- {name}: {_curve(run)}")
    reached = goal(runs, recipes)
    print("\n".join(reached))
    write(options, "time_to_accuracy", where, runs=runs, goal=reached, configs=configs)


def contestants(
    recipes: dict[str, Config], article: Config, splits: Splits, backbone: Backbone, device: torch.device, options
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name and call of each run; live is the first of our recipes."""
    for name, recipe in recipes.items():
        for seed in range(options.repeats):
            yield name, partial(train_once, recipe, splits, backbone, device, seed)
    if options.live_epochs:
        name, recipe = next(iter(recipes.items()))
        live = short(recipe, options.live_epochs)
        name = f"{name}, live backbone, {options.live_epochs} epochs"
        yield name, partial(train_once, live, splits, backbone, device, seed=0)
    if options.article_epochs:
        yield ARTICLE, partial(as_written, article, splits, device, options)


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's options, and those for the configuration."""
    parser = Parser(
        "time_to_accuracy", __doc__, seconds=300, tiny={"repeats": 2, "live_epochs": 1, "article_epochs": 1}
    )
    parser.allow_abbrev = False
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each of our recipes, seeds 0, 1, ... (default 3)"
    )
    parser.add_argument(
        "--live-epochs",
        type=int,
        default=5,
        least=0,
        help="epochs of our first recipe with a live backbone (default 5); 0: leave it out",
    )
    parser.add_argument(
        "--article-epochs",
        type=int,
        default=2,
        least=0,
        help="epochs of the article's recipe (default 2); 0: leave it out",
    )
    return parser.parse_known_args(argv)


def configurations(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Config], Config]:
    """Our recipes by name and the article's, on the data and the backbone of our first recipe."""
    names = ["digits.yaml"] if options.tiny else ["cifar100_head.yaml", "cifar100_fast.yaml"]
    files = {"ours" if options.tiny else f"ours, {name}": ["--config", str(CONFIGS / name)] for name in names}
    if any(word.split("=")[0] == "--config" for word in rest):
        files = {"ours": []}  # a second file would override the first
    limits = LIMITS if options.tiny else []
    brief = ["--train.epochs", "3", "--router.warmup_steps", "2", *limits] if options.tiny else []
    words = ["--features.cache_dir", "null", *brief, *rest]
    recipes = {name: parse_command_line([*file, *words]).config for name, file in files.items()}
    ours = next(iter(recipes.values())).to_dict()
    small = ["--backbone.name", ours["backbone"]["name"], *SMALL] if options.tiny else []
    article = parse_command_line(["--config", str(CONFIGS / "article.yaml"), *small]).config.to_dict()
    same = {key: ours["backbone"][key] for key in ("name", "weights", "pretrained", "image_size")}
    return recipes, config_from_dict(article | {"data": ours["data"], "backbone": article["backbone"] | same})


def short(config: Config, epochs: int) -> Config:
    """The same recipe with a live backbone and fewer epochs, with schedule and warm-up in proportion."""
    values = config_from_dict(config.to_dict())
    share = epochs / values.train.epochs
    values.features.mode, values.train.epochs = "live", epochs
    values.router.warmup_steps = int(values.router.warmup_steps * share)
    values.optim.warmup_steps = int(values.optim.warmup_steps * share)
    return values


def warm_up(backbone: Backbone, device: torch.device) -> None:
    """Load libraries and kernels."""
    import sklearn.metrics  # noqa: F401
    import timm.optim
    import timm.utils  # noqa: F401

    backbone(torch.zeros(2, 3, backbone.image_size, backbone.image_size, device=device))
    weight = torch.zeros(8, 8, device=device, requires_grad=True)
    F.linear(weight, weight).sum().backward()
    synchronise(device)


class Article(nn.Module):
    """The article's classifier around its frozen ViT, in float32, experts in a loop with masks."""

    def __init__(self, config: Config, backbone: Backbone, num_classes: int):
        super().__init__()
        self.vit = backbone.vit.float().eval().requires_grad_(False)
        self.mean, self.std, self.size = backbone.mean, backbone.std, (backbone.image_size,) * 2
        device = next(self.vit.parameters()).device
        with torch.no_grad():
            tokens = self.vit.forward_features(torch.zeros(1, 3, *self.size, device=device))
        self.head = build_model(config, tuple(tokens.shape[1:]), num_classes).to(device)

    def forward(self, images: Tensor, warmup: bool) -> tuple[Tensor, Tensor]:
        """Logits, and the samples of each expert."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        x_BCHW = F.interpolate(images.float() / 255, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            tokens = self.vit.forward_features((x_BCHW - mean) / std)
        x_BD = self.head.neck(tokens)
        routing = self.head.moe.router(x_BD, warmup)
        chosen = (len(x_BD), self.head.moe.router.top_k)
        logits = article_loop(self.head.moe.experts, x_BD, routing.expert_A.view(chosen), routing.weight_A.view(chosen))
        return logits, routing.counts_E


def as_written(config: Config, splits: Splits, device: torch.device, options: argparse.Namespace) -> dict:
    """The article's recipe: Adam 1e-4, batch 64, random routing for 500 steps, usage variance as auxiliary loss."""
    backbone = load_backbone(config.backbone, device, reachable)
    seed_everything(0)
    warm_up(backbone, device)
    data = TensorDataset(splits.train.images_NCHW, splits.train.labels_N)
    curve, seconds, step, began = [], 0.0, 0, time.perf_counter()
    model = Article(config, backbone, splits.train.num_classes)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-4)
    for epoch in range(1, options.article_epochs + 1):
        model.head.train()
        done = 0
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            logits, counts_E = model(images.to(device), warmup=step < 500)
            loss = F.cross_entropy(logits, labels.to(device)) + 0.01 * usage_variance(counts_E)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, done = step + 1, done + len(labels)
            if step % 50 == 0:
                print(f"article: epoch {epoch}, step {step}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
            if seconds + time.perf_counter() - began > options.seconds:
                break
        synchronise(device)
        seconds += time.perf_counter() - began
        whole = done / len(data)
        curve.append({"epoch": epoch - 1 + whole, "seconds": seconds, "macro_f1": _test(model, splits, device)})
        print(f"article: {_points(curve[-1:])}", file=sys.stderr, flush=True)
        if whole < 1:
            break
        began = time.perf_counter()
    best = max(curve, key=lambda point: point["macro_f1"])
    return {"seconds": best["seconds"], "macro_f1": best["macro_f1"], "best_epoch": best["epoch"], "curve": curve}


@torch.no_grad()
def _test(model: Article, splits: Splits, device: torch.device) -> float:
    model.head.eval()
    images = splits.test.images_NCHW.split(256)
    predicted = torch.cat([model(part.to(device), warmup=False)[0].argmax(dim=1).cpu() for part in images])
    return scores(splits.test.labels_N.numpy(), predicted.numpy(), splits.test.num_classes)["macro_f1"]


def _line(name: str, runs: list) -> list[str]:
    done = [run for run in runs if not isinstance(run, Failure)]
    if not done:
        return [name, "-", "-", "0"]
    seconds, f1 = (Timing.of([run[key] for run in done]) for key in ("seconds", "macro_f1"))
    return [
        name,
        f"{seconds.median:.1f} ({seconds.low:.1f}-{seconds.high:.1f})",
        f"{100 * f1.median:.2f} ({100 * f1.low:.2f}-{100 * f1.high:.2f})",
        str(len(done)),
    ]


def _curve(run: dict) -> str:
    if "curve" in run:
        return _points(run["curve"])
    epochs = run["epoch_seconds"]
    return f"best epoch {run['best_epoch']}; first epoch {epochs[0]:.2f} s, last {epochs[-1]:.2f} s of {len(epochs)}"


def _points(curve: list[dict]) -> str:
    points = (f"{p['epoch']:.3g} epochs {p['seconds']:.0f} s {100 * p['macro_f1']:.2f} %" for p in curve)
    return "; ".join(points)


def goal(runs: dict[str, list], recipes: Collection[str]) -> list[str]:
    """The goal: a higher macro-F1 than the article's best in at most 1/50 of the time that it needs for it."""
    other = [run for run in runs.get(ARTICLE, []) if not isinstance(run, Failure)]
    lines = []
    for name in recipes:
        mine = [run for run in runs.get(name, []) if not isinstance(run, Failure)]
        if not mine or not other:
            continue
        # For an even number, the slower one of the two middle runs, so that the goal does not get easier.
        run, article = sorted(mine, key=lambda run: run["seconds"])[len(mine) // 2], other[0]
        lines.append(
            f"goal: {name} {100 * run['macro_f1']:.2f} % in {run['seconds']:.1f} s; the article's best epoch so far "
            f"{100 * article['macro_f1']:.2f} % in {article['seconds']:.1f} s, "
            f"{article['seconds'] / run['seconds']:.1f} times as long"
        )
    return lines or ["goal: not measured"]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
