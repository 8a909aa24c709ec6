"""Compare a mixture with a dense part of equal FLOPs in its place, both trained: memory, time, and scores.

python -m benchmarks.cost --data.root DATA --backbone.weights FILE      the default recipe, on a GPU
python -m benchmarks.cost --config configs/cifar100_head.yaml           another recipe
python -m benchmarks.cost --untrained                                   only sizes, FLOPs and latency: one minute
python -m benchmarks.cost --tiny                                        a quick trial on a CPU, with digits

Options that are not listed below go to train.py's configuration. The dense part is that of dense_twin: trained in
the same way, on the same data, features and seed. Latency is from images to predictions; on a GPU it is also measured
on the CPU, in float32. --seconds: duration of each latency measurement.
"""

import contextlib
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from assembly.pipeline import Inputs, build_bank, build_model
from assembly.twin import twin_of
from benchmarks.common import Failure, Parser, attempt, environment, header, save, start, table, write
from benchmarks.runs import trained_run
from common.errors import exit_code_of, warn
from common.network import reachable
from common.text import counted
from config.command_line import parse_command_line
from config.config import Config
from data.datasets import load_splits
from evaluation.latency import latencies
from evaluation.metrics import scores
from evaluation.predict import predict
from evaluation.run_cost import LEGEND, NAMES, run_cost, shown
from features.bank import FeatureBank
from features.images import ImageBank
from model.backbone import load_backbone

TINY = ["--config", "configs/digits.yaml", "--data.max_per_class", "20", "--neck.kind", "pooled"]
TINY += ["--backbone.features", "[cls:1,mean:1]", "--train.epochs", "2", "--train.batch_size", "32"]
TINY += ["--router.warmup_steps", "2"]
LEFT_OUT = {"peak_memory_gib", "kept_epoch"}  # the peak is that of the whole process, which trains both


def main(argv: list[str] | None = None) -> None:
    """Train both, measure both, print the table, write the JSON."""
    parser = Parser("cost", __doc__, seconds=5, tiny={"seconds": 0.1})
    parser.allow_abbrev = False
    parser.add_argument("--untrained", action="store_true", help="measure new weights, without training")
    options, rest = parser.parse_known_args(argv)
    device = start(options)
    where = environment(device)
    rest = [*TINY, *rest] if options.tiny else rest
    config = parse_command_line([*rest, "--features.cache_dir", "null", "--train.save_every", "1000"]).config
    inputs = Inputs(device, load_splits(config.data), load_backbone(config.backbone, device, reachable))
    bank = build_bank(config, inputs.splits, inputs.backbone, device)
    twin = twin_of(config, bank.feature_shape, inputs.splits.train.num_classes, inputs.backbone)
    if not options.untrained:
        extract(bank)
    found, measured_by = {}, measure_new if options.untrained else measure
    for name, one in named(config, twin).items():
        figures = attempt(partial(measured_by, one, inputs, bank, options.seconds))
        if isinstance(figures, Failure):
            warn(f"{name} has no results: {figures.reason}")
        else:
            found[name] = figures
        save(options, "cost", where, figures=found, config=config.to_dict(), twin=twin.to_dict())
    print(header("A mixture and a dense part of equal FLOPs in its place", where))
    print(f"on the CPU with {counted(torch.get_num_threads(), 'thread')}")
    print(table(["", *found], [[what, *cells] for what, *cells in rows(found)]))
    print(f"\n{LEGEND}")
    write(options, "cost", where, figures=found, config=config.to_dict(), twin=twin.to_dict())


def named(config: Config, twin: Config) -> dict[str, Config]:
    """Both configurations, by their names in the table."""
    sizes = [", ".join(one.experts.labels()) for one in (config, twin)]
    return {f"mixture ({sizes[0]})": config, f"dense ({sizes[1].partition(' · ')[2]})": twin}


def extract(bank: FeatureBank | ImageBank) -> None:
    """Extract the features now, so that they do not count as time of the first run."""
    if isinstance(bank, FeatureBank):
        for view in range(bank.views_used):
            next(bank.batches("train", 1, view=view))
    for split in ("validation", "test"):
        next(bank.batches(split, 1))


def measure(config: Config, inputs: Inputs, bank: FeatureBank | ImageBank, seconds: float) -> dict[str, Any]:
    """Train, and return the cost and macro_f1 on the test images. Training seconds are without features."""
    with trained_run(config, inputs, bank) as (trainer, _), contextlib.redirect_stdout(sys.stderr):
        model, history, kept = trainer.model.eval(), trainer.run.history(), trainer.best["epoch"]
        answers = predict(model, bank, "test")
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()
    times = latencies(model, inputs.backbone, bank.splits.test.images_NCHW, True, seconds)
    load_E = answers.load_LE.mean(axis=0)
    cost = run_cost(model, inputs.backbone, bank.feature_shape, load_E, history, kept, times)
    return cost | scores(answers.labels_N, answers.predicted_N, inputs.splits.test.num_classes)


@torch.no_grad()
def measure_new(config: Config, inputs: Inputs, bank: FeatureBank | ImageBank, seconds: float) -> dict[str, Any]:
    """The cost of new weights, under an even load; gates are random, so that batches need all experts."""
    model = build_model(config, bank.feature_shape, inputs.splits.test.num_classes, inputs.backbone).eval()
    for name, weight in model.named_parameters():
        if ".gate." in name:
            weight.normal_()
    model = model.to(inputs.device)
    times = latencies(model, inputs.backbone, bank.splits.test.images_NCHW, True, seconds)
    count = model.mixtures[0].router.num_experts
    return run_cost(model, inputs.backbone, bank.feature_shape, np.full(count, 1 / count), [], None, times)


def rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Name, and a cell for each run; values that no run has are left out."""
    lines = [
        [what, *(shown(name, figures[name]) for figures in found.values())]
        for name, what in NAMES.items()
        if name not in LEFT_OUT and any(figures[name] is not None for figures in found.values())
    ]
    scored = [figures["macro_f1"] for figures in found.values() if "macro_f1" in figures]
    return [*lines, ["macro-F1, test", *(f"{100 * score:.2f} %" for score in scored)]] if scored else lines


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
