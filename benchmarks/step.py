"""Milliseconds of one training step of the default head, eager and as a CUDA graph, compared with dense MLPs.

python -m benchmarks.step                 about 30 s on a GPU
python -m benchmarks.step --tiny          a quick trial on a CPU

A step selects its batch from features in memory, trains, and updates the moving average, as in train.py. The dense
heads have as many hidden units as a sample uses in the mixture, and as all its experts have together.
"""

import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import HEAD_RECIPE, Failure, Parser, attempt, environment, header, start, table, timed, write
from common.errors import exit_code_of
from config.command_line import parse_command_line
from config.optim import OptimConfig
from evaluation.cost import head_cost, parameters
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from training.graph import GraphedStep
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

CLASSES, SAMPLES = 100, 50_000


def main(argv: list[str] | None = None) -> None:
    """Time every contestant, print the table, write the JSON."""
    parser = Parser("step", __doc__, seconds=30, tiny={"batch": 32})
    parser.add_argument("--batch", type=int, default=1024, help="samples per step (default 1024)")
    options = parser.parse_args(argv)
    config = parse_command_line(["--config", str(HEAD_RECIPE)]).config
    groups = len(config.backbone.features)
    features = 768 * groups
    if options.tiny:
        features = 4 * groups
        config.router.hidden, config.experts.sizes, config.experts.shared = [8], [[4], [8], [8], [16]], [[16]]
    device = start(options)
    where = environment(device)
    samples = SAMPLES if device.type == "cuda" else 4 * options.batch
    stored = torch.randn(samples, features, device=device).half()
    labels_N = torch.randint(CLASSES, (samples,), device=device)
    rows = []
    for name, parts, mode in contestants(config):
        # What train.py captures: no mode that waits, and none whose kernel may be missing.
        graphs = (False, True) if device.type == "cuda" and mode in ("dense", "auto") else (False,)
        for captured in graphs:
            run = attempt(
                lambda parts=parts, mode=mode, captured=captured: measure(
                    parts, mode, captured, stored, labels_N, groups, options.batch, options.seconds / 20
                )
            )
            rows.append({"head": name, "graph": captured, "run": run})
    print(header(f"One training step, {features:,} features, batch {options.batch}", where))
    columns = ["head", "dispatch", "ms per step (range)", "parameters", "MFLOP per sample"]
    print(table(columns, [_line(row) for row in rows]))
    write(options, "step", where, batch=options.batch, features=features, rows=rows)


def contestants(config) -> list[tuple[str, tuple[RouterConfig, ExpertsConfig, BalanceConfig], str]]:
    """(name, parts of the head, dispatch mode)."""
    sizes, shared = config.experts.sizes, config.experts.shared
    sums = [sum(sum(size) for size in group) for group in (sizes, shared)]
    active = sums[1] + config.router.top_k * sums[0] // len(sizes)
    one = RouterConfig(kind="mixtral", top_k=1)
    none = BalanceConfig(switch=0.0)
    moe = (config.router, config.experts, config.balance)
    found = [("mixture", moe, mode) for mode in ("sorted", "dense", "grouped")]
    for label, width in (("active", active), ("total", sum(sums))):
        found.append((f"dense MLP, {width} units ({label})", (one, ExpertsConfig(sizes=[[width]]), none), "auto"))
    return found


def measure(parts, mode: str, captured: bool, stored, labels_N, groups: int, batch: int, seconds: float) -> dict:
    """Time steps over random batches; `mode` is the dispatch mode, groups the number of features per sample."""
    router, experts, balance = parts
    device = stored.device
    torch.manual_seed(0)
    experts = ExpertsConfig(**{**vars(experts), "dispatch": mode})
    model = VisionMoE((stored.shape[1],), CLASSES, NeckConfig(), router, experts, groups).to(device).train()
    once = on_batches(step_of(model, balance, batch, captured), stored, labels_N, batch)
    timing = timed(lambda: [once() for _ in range(20)], device, seconds, warm=2)
    cost = head_cost(model, (stored.shape[1],))
    return {"timing": timing, "steps": 20, "parameters": parameters(model), "flops": cost.flops, "dispatch": mode}


def step_of(model: VisionMoE, balance: BalanceConfig, batch: int, captured: bool) -> Callable:
    """A training step (features, labels) with learning rate and moving average, as in the trainer."""
    from timm.utils import ModelEmaV3

    optim = OptimConfig()
    optimizer = build_optimizer(model, optim)
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    step = TrainingStep(model, optimizer, balance, 0.1, optim.clip_norm, "auto")
    run = GraphedStep(step, batch) if captured else step
    done = 0

    def train(features, labels_B) -> None:
        nonlocal done
        set_learning_rate(optimizer, done % 1000, 1000, optim)
        run(features, labels_B, warmup=False)
        done += 1
        ema.update(model, step=done)

    return train


def on_batches(train: Callable, features_NF: Tensor, labels_N: Tensor, batch: int) -> Callable[[], None]:
    """`train` repeatedly on the next batch of samples in random order."""
    order_N = torch.randperm(len(labels_N), device=labels_N.device)
    starts = itertools.cycle(range(0, max(1, len(labels_N) - batch + 1), batch))

    def step() -> None:
        start = next(starts)
        index_B = order_N[start : start + batch]
        train(features_NF.index_select(0, index_B), labels_N.index_select(0, index_B))

    return step


def _line(row: dict) -> list[str]:
    run = row["run"]
    if isinstance(run, Failure):
        return [row["head"], "graph" if row["graph"] else "-", run.reason, "-", "-"]
    way = run["dispatch"] + (", graph" if row["graph"] else "")
    timing, n = run["timing"], run["steps"]
    shown = f"{1e3 * timing.median / n:.3g} ({1e3 * timing.low / n:.3g}-{1e3 * timing.high / n:.3g})"
    return [row["head"], way, shown, f"{run['parameters']:,}", f"{run['flops'] / 1e6:.1f}"]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
