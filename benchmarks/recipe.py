"""A recipe over many seeds, next to dense heads that cost a sample the same, all as train.py trains them.

python -m benchmarks.recipe --data.root DATA --backbone.weights FILE      the default recipe, 10 seeds, on a GPU
python -m benchmarks.recipe --config configs/digits.yaml --seeds 3        another one
python -m benchmarks.recipe --tiny                                        a rehearsal on a CPU, with digits

Options that are none of those below go to train.py's configuration. The dense heads are one expert whose hidden layer
is as wide as the recipe's FLOPs a sample allow under an even load, its gate included: one with the recipe's settings,
one with a higher learning rate and less decay and dropout. All read the same features, and those of one seed the same
batches. The test images are scored once a run, with the epoch that was best on the validation images.
"""

import argparse
import json
import sys
import time

from benchmarks.common import Failure, Parser, attempt, environment, header, start, table, width_of_cost, write
from benchmarks.runs import train_once
from benchmarks.study_tables import COLUMNS, cells, rows
from data.datasets import load_splits
from engine.config import Config, config_from_dict, parse_command_line
from engine.pipeline import build_bank, build_model
from engine.summary import head_cost
from errors import exit_code_of
from model.backbone import load_backbone
from model.balance import BalanceConfig
from model.routers import RouterConfig

TINY = ["--config", "configs/digits.yaml", "--data.max_per_class", "20", "--neck.kind", "pooled"]
TINY += ["--backbone.features", "[cls:1,mean:1]", "--train.epochs", "2", "--train.batch_size", "32"]
TINY += ["--router.warmup_steps", "2"]
LIGHTER = {"dropout": 0.3, "lr": 2e-3, "weight_decay": 0.5}


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, write the JSON."""
    parser = Parser("recipe", __doc__, seconds=900)
    parser.allow_abbrev = False
    parser.add_argument("--seeds", type=int, default=10, help="runs of each head: seeds 0, 1, ... (default 10)")
    options, rest = parser.parse_known_args(argv)
    if options.tiny:
        options.seeds, rest = 2, [*TINY, *rest]
    device = start(options)
    where = environment(device)
    config = parse_command_line([*rest, "--features.cache_dir", "null", "--train.save_every", "1000"]).config
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device)
    bank = build_bank(config, splits, backbone, device)
    contestants = heads(config, bank.feature_shape, splits.train.num_classes)
    for view in range(bank.views_used):  # now, and not on the clock of the first run
        next(bank.batches("train", 1, view=view))
    deadline = time.perf_counter() + options.seconds
    runs: dict[str, dict[int, dict]] = {name: {} for name in contestants}
    for seed in range(options.seeds):
        for name, head in contestants.items():
            if time.perf_counter() > deadline:
                continue
            found = attempt(lambda head=head, seed=seed: train_once(head, splits, backbone, device, seed, bank))
            if isinstance(found, Failure):
                print(f"{name}, seed {seed}: {found.reason}", file=sys.stderr)
            else:
                runs[name][seed] = found
                print(json.dumps({"head": name, "seed": seed, **found}), file=sys.stderr, flush=True)
    report(options, where, config, {name: found for name, found in runs.items() if found})


def heads(config: Config, shape: tuple[int, ...], classes: int) -> dict[str, Config]:
    """The recipe and its dense rivals, by name."""

    def flops(one: Config) -> int:
        return head_cost(build_model(one, shape, classes), shape).flops

    width = width_of_cost(lambda width: flops(dense(config, width)), flops(config))
    lighter = dense(config, width)
    lighter.experts.dropout = LIGHTER["dropout"]
    lighter.optim.lr, lighter.optim.weight_decay = LIGHTER["lr"], LIGHTER["weight_decay"]
    return {
        "recipe": config,
        f"dense, {width} units": dense(config, width),
        f"dense, {width} units, lighter": lighter,
    }


def dense(config: Config, width: int) -> Config:
    """The same recipe with one expert that every sample passes, of one hidden layer."""
    found = config_from_dict(config.to_dict())
    found.experts.sizes, found.experts.shared, found.experts.inputs = [[width]], [], None
    if isinstance(found.experts.dropout, list):
        found.experts.dropout = found.experts.dropout[-1]
    found.router = RouterConfig(kind="mixtral", top_k=1, norm="none", warmup_steps=0)
    found.balance = BalanceConfig(switch=0.0)
    return found


def report(options: argparse.Namespace, where: dict, config: Config, runs: dict[str, dict[int, dict]]) -> None:
    """The table, each dense head paired with the recipe, and everything as JSON."""
    found = rows(runs, {}, dict.fromkeys(runs.keys() - {"recipe"}, "recipe"))
    print(header("A recipe and dense heads of equal FLOPs: test scores, paired with the recipe", where))
    print(table(COLUMNS, [cells(row) for row in found]))
    write(options, "recipe", where, rows=found, runs=runs, config=config.to_dict())


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
