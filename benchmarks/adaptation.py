"""Compare ways to adapt one frozen ViT: experts in its blocks, a dense adapter, LoRA, full fine-tuning, other recipes.

python -m benchmarks.adaptation --data.root DATA --backbone.weights FILE              all methods, on a GPU
python -m benchmarks.adaptation --methods lora --seeds 3 --data.root DATA ...         some of the runs
python -m benchmarks.adaptation --tables                                              the stored results, as Markdown
python -m benchmarks.adaptation --tiny                                                a quick trial on a CPU, with
digits

experts: the default recipe. dense: one adapter in each block, with the recipe's active width under an even load. lora:
LoRA with the same number of trained weights (peft), in every matrix of the blocks. full: all weights of the ViT. head:
the head recipe. article: the reference recipe, on cached features. The first four use the same images, views, order,
batches, schedule and linear head. dense, lora and full each use the best of three learning rates on validation images
(a tenth of the training images, --pick_epochs epochs, one seed; the recipe was chosen on the same split). The test
images are scored once per run.

Every run is a line of --out/adaptation.jsonl, and runs in this file are not repeated. Several processes, each with its
own GPU and its own --out, can therefore share the work with --methods and --first_seed; concatenate their files to get
one file of all runs. Options that are not listed below go to train.py's configuration.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from assembly.pipeline import Inputs, load_inputs
from benchmarks.adaptation_models import lora_rank, train_adapted
from benchmarks.common import HEAD_RECIPE, Parser, environment, header, start, synchronise, table
from benchmarks.runs import trained_run
from benchmarks.study_tables import paired_interval
from common.errors import exit_code_of
from config.command_line import parse_command_line
from config.config import Config, config_from_dict
from evaluation.metrics import scores
from evaluation.predict import predict

RATES = {"dense": [2.5e-4, 5e-4, 1e-3], "lora": [3e-4, 1e-3, 3e-3], "full": [1e-5, 3e-5, 1e-4]}
BEHIND = {"head": HEAD_RECIPE, "article": HEAD_RECIPE.with_name("article.yaml")}
METHODS = ["experts", *RATES, *BEHIND]
TINY = ["--config", "configs/digits_blocks.yaml", "--data.max_per_class", "20", "--train.epochs", "1"]
TINY += ["--train.batch_size", "32", "--data.validation", "0.2", "--router.warmup_steps", "2"]


def main(argv: list[str] | None = None) -> None:
    """Train the requested runs that are missing, and print the table of all runs."""
    parser = Parser("adaptation", __doc__, seconds=3600, tiny={"seeds": 1, "methods": ["experts", "dense", "full"]})
    parser.allow_abbrev = False
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods to run (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--first_seed", type=int, default=0, least=0, help="the first of the seeds (default 0)")
    parser.add_argument(
        "--pick_epochs", type=int, default=3, help="epochs of a run that selects a learning rate (default 3)"
    )
    parser.add_argument(
        "--pick_only", action="store_true", help="only choose learning rates, without the test images (default: no)"
    )
    parser.add_argument("--tables", action="store_true", help="only print the stored results (default: no)")
    options, rest = parser.parse_known_args(argv)
    rest = [*TINY, *rest] if options.tiny else rest
    device = start(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"adaptation{'_tiny' if options.tiny else ''}.jsonl"
    base = parse_command_line([*rest, "--train.save_every", "1000"]).config
    for method in [] if options.tables else options.methods:
        rates = RATES.get(method, [None])
        for lr in rates if len(rates) > 1 else []:
            tried = of_method(method, base, rest, lr)
            tried.data.validation, tried.train.epochs = max(0.1, base.data.validation), options.pick_epochs
            once(path, {"method": method, "pick": True, "seed": 0, "lr": lr}, tried, "validation")
        if options.pick_only:
            continue
        picked = best_rate(read(path), method)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            config = of_method(method, base, rest, picked)
            config.train.seed = seed
            once(path, {"method": method, "pick": False, "seed": seed, "lr": config.optim.lr}, config, "test")
    title = "Ways to adapt a frozen ViT: test scores"
    print(title if options.tables else header(title, environment(device)))
    print(table(*report(read(path))))


def of_method(method: str, base: Config, rest: list[str], lr: float | None) -> Config:
    """The configuration of a method."""
    if method in BEHIND:
        inside = ("--neck", "--router", "--experts", "--balance", "--optim", "--train", "--config")
        kept = [word for word in _pairs(rest) if not word[0].startswith(inside)]
        words = ["--config", str(BEHIND[method]), "--features.mode", "cached"]
        return parse_command_line([*words, *(word for pair in kept for word in pair)]).config
    config = config_from_dict(base.to_dict())
    config.optim.lr = lr or config.optim.lr
    if method == "dense":
        count = len(config.experts.sizes)
        active = config.router.top_k * sum(config.experts.hidden(e)[0] for e in range(count)) / count
        config.experts.sizes = [[round(active)]]
        config.router = config_from_dict({"router": {"kind": "noisy_topk", "top_k": 1, "norm": "none"}}).router
        config.router.warmup_steps = 0
        config.balance.switch = 0.0
    return config


def _pairs(words: list[str]) -> list[tuple[str, ...]]:
    """A command line as options with their values."""
    found: list[tuple[str, ...]] = []
    for word in words:
        found = [*found, (word,)] if word.startswith("--") else [*found[:-1], (*found[-1], word)]
    return found


def once(path: Path, key: dict, config: Config, split: str) -> None:
    """Train and score on a split, unless the file has that run; append the result."""
    if any(all(line.get(name) == value for name, value in key.items()) for line in read(path)):
        return
    began = time.perf_counter()
    inputs = load_inputs(config)
    method = key["method"]
    if method in ("lora", "full"):
        rank = lora_rank(config, inputs.backbone) if method == "lora" else 0
        found = train_adapted(config, inputs, rank, split)
    else:
        found = _by_trainer(config, inputs, split)
    line = {**key, **found, "wall": time.perf_counter() - began}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), file=sys.stderr, flush=True)


def _by_trainer(config: Config, inputs: Inputs, split: str) -> dict:
    with trained_run(config, inputs) as (trainer, seconds):
        answers = predict(trainer.model, trainer.bank, split)
        synchronise(inputs.device)
        found = scores(answers.labels_N, answers.predicted_N, inputs.splits.train.num_classes)
        trained = sum(parameter.numel() for parameter in trainer.model.parameters())
        return {**found, "loss": answers.loss(), "seconds": seconds, "trained": trained}


def read(path: Path) -> list[dict]:
    """The runs in a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def best_rate(lines: list[dict], method: str) -> float | None:
    """The learning rate with the best validation macro-F1; None if none was tried."""
    tried = [line for line in lines if line["method"] == method and line["pick"]]
    return max(tried, key=lambda line: line["macro_f1"])["lr"] if tried else None


def report(lines: list[dict]) -> tuple[list[str], list[list]]:
    """Columns and rows: mean and deviation of each method, and its paired difference to the experts (95 %)."""
    by: dict[str, dict[int, dict]] = {}
    for method in METHODS:
        runs, best = [x for x in lines if x["method"] == method and not x["pick"]], best_rate(lines, method)
        by[method] = {run["seed"]: run for run in runs if best in (None, run["lr"])}
    rows = []
    for method, runs in by.items():
        if not runs:
            continue
        f1 = 100 * np.array([run["macro_f1"] for run in runs.values()])
        both = [] if method == "experts" else sorted(set(runs) & set(by["experts"]))
        paired = _difference([runs[seed]["macro_f1"] for seed in both], [by["experts"][s]["macro_f1"] for s in both])
        spread = f" ± {f1.std(ddof=1):.2f}" if len(f1) > 1 else ""
        some = next(iter(runs.values()))
        seconds = np.median([run["seconds"] for run in runs.values()])
        trained = f"{some['trained'] / 1e6:.2f} M"
        score = f"{f1.mean():.2f}{spread}"
        rows.append([method, f"{some['lr']:g}", len(f1), score, paired, trained, f"{seconds:.0f} s"])
    return ["method", "lr", "seeds", "macro-F1", "paired difference (95 %)", "trained", "training"], rows


def _difference(theirs: list[float], experts: list[float]) -> str:
    if not theirs:
        return "-"
    mean, low, high = paired_interval(theirs, experts)
    return f"{100 * mean:+.2f}" + ("" if low is None or high is None else f" ({100 * low:+.2f} to {100 * high:+.2f})")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
