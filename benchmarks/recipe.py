"""A recipe over many seeds, compared with a dense head of the same cost per sample, both trained as in train.py.

python -m benchmarks.recipe --data.root DATA --backbone.weights FILE      the head recipe, 10 seeds, on a GPU
python -m benchmarks.recipe --config configs/digits.yaml --seeds 3        another recipe
python -m benchmarks.recipe --tiny                                        a quick trial on a CPU, with digits

Options that are not listed below go to train.py's configuration. The dense head is one expert whose hidden layer is as
wide as the recipe's FLOPs per sample allow under an even load, including its gate. Its learning rate, weight decay and
dropout are the best ones on validation images (of the head recipe). Both read the same features, and with the same seed
the same batches. The test images are scored once per run, with the weights selected by train.keep.
"""

import argparse
import json
import sys
import time

from assembly.pipeline import build_bank, build_model
from benchmarks.common import (
    HEAD_RECIPE,
    Failure,
    Parser,
    Timing,
    attempt,
    environment,
    header,
    start,
    synchronise,
    table,
    width_of_cost,
    write,
)
from benchmarks.runs import train_once
from benchmarks.study_tables import rows, shown
from common.errors import exit_code_of
from common.network import reachable
from config.command_line import parse_command_line
from config.config import Config, config_from_dict
from data.datasets import load_splits
from evaluation.cost import head_cost
from model.backbone import load_backbone
from model.balance import BalanceConfig
from model.routers import RouterConfig

TINY = ["--config", "configs/digits.yaml", "--data.max_per_class", "20", "--neck.kind", "pooled"]
TINY += ["--backbone.features", "[cls:1,mean:1]", "--train.epochs", "2", "--train.batch_size", "32"]
TINY += ["--router.warmup_steps", "2"]
DENSE = {"dropout": 0.3, "lr": 2e-3, "weight_decay": 0.5}


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, write the JSON."""
    parser = Parser("recipe", __doc__, seconds=900, tiny={"seeds": 2})
    parser.allow_abbrev = False
    parser.add_argument("--seeds", type=int, default=10, help="runs of each head: seeds 0, 1, ... (default 10)")
    options, rest = parser.parse_known_args(argv)
    if options.tiny:
        rest = [*TINY, *rest]
    elif not any(word.split("=")[0] == "--config" for word in rest):
        rest = ["--config", str(HEAD_RECIPE), *rest]
    device = start(options)
    where = environment(device)
    config = parse_command_line([*rest, "--features.cache_dir", "null", "--train.save_every", "1000"]).config
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device, reachable)
    bank = build_bank(config, splits, backbone, device)
    contestants = heads(config, bank.feature_shape, splits.train.num_classes)
    began = time.perf_counter()
    for view in range(bank.views_used):  # now, so that it does not count as time of the first run
        next(bank.batches("train", 1, view=view))
    for split in ("validation", "test"):
        next(bank.batches(split, 1))
    synchronise(device)
    extracted = time.perf_counter() - began
    print(f"{bank.views_used} views in {extracted:.1f} s", file=sys.stderr)
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
    report(options, where, config, {name: found for name, found in runs.items() if found}, extracted)


def heads(config: Config, shape: tuple[int, ...], classes: int) -> dict[str, Config]:
    """The recipe and its dense counterpart, by name."""

    def flops(one: Config) -> int:
        return head_cost(build_model(one, shape, classes), shape).flops

    width = width_of_cost(lambda width: flops(dense(config, width)), flops(config))
    return {"recipe": config, f"dense, {width} units": dense(config, width)}


def dense(config: Config, width: int) -> Config:
    """The recipe's data with one expert for all samples, with one hidden layer and separate settings."""
    found = config_from_dict(config.to_dict())
    found.experts.sizes, found.experts.shared, found.experts.inputs = [[width]], [], None
    found.experts.dropout = DENSE["dropout"]
    found.optim.lr, found.optim.weight_decay = DENSE["lr"], DENSE["weight_decay"]
    found.router = RouterConfig(kind="mixtral", top_k=1, norm="none", warmup_steps=0)
    found.balance = BalanceConfig(switch=0.0)
    return found


def report(
    options: argparse.Namespace, where: dict, config: Config, runs: dict[str, dict[int, dict]], extracted: float
) -> None:
    """The table, the dense head paired with the recipe, the times, and everything as JSON."""
    found = rows(runs, {}, dict.fromkeys(runs.keys() - {"recipe"}, "recipe"))
    print(header("A recipe and a dense head of equal FLOPs: test scores, paired with the recipe", where))
    print(table(*shown(found)))
    print(f"\nfeatures of all images and views: {extracted:.1f} s; seconds per run until the test images are scored:")
    for name, of_seed in runs.items():
        seconds = Timing.of([run["seconds"] for run in of_seed.values()])
        print(f"{name}: {seconds.median:.1f} ({seconds.low:.1f}-{seconds.high:.1f})")
    write(options, "recipe", where, rows=found, runs=runs, config=config.to_dict(), extraction_seconds=extracted)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
