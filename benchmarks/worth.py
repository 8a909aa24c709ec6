"""Contribution of each expert of a recipe on validation images: macro-F1 without it, for choosing recipes.

python -m benchmarks.worth --config configs/cifar100.yaml --data.root DATA --backbone.weights FILE
python -m benchmarks.worth --config configs/cifar100.yaml --experts.sizes "[[16],[32],[64]]" --name "three experts" ...
python -m benchmarks.worth --tiny                                                     a quick trial on digits, CPU

A tenth of the training images is held out unless --data.validation is set; the test images are not used. Each run is a
line of --out/worth.jsonl, and the table shows all lines. Options that are not listed below go to train.py's
configuration.
"""

import sys
from typing import Any

from analysis.experts import removal
from assembly.pipeline import load_inputs
from benchmarks.common import Parser, append_line, read_lines, start, table
from benchmarks.runs import trained_run
from common.errors import exit_code_of
from config.command_line import parse_command_line
from config.config import Config
from evaluation.metrics import scores
from evaluation.predict import predict

TINY = ["--config", "configs/digits_blocks.yaml", "--data.max_per_class", "20", "--train.epochs", "1"]
TINY += ["--train.batch_size", "32", "--router.warmup_steps", "2"]


def main(argv: list[str] | None = None) -> None:
    """Train a recipe, remove each expert in turn, append a line and print all lines."""
    parser = Parser("worth", __doc__, seconds=600)
    parser.allow_abbrev = False
    parser.add_argument("--name", default="recipe", help="name of the run in the table (default recipe)")
    options, rest = parser.parse_known_args(argv)
    start(options)
    words = ["--data.validation", "0.1", *(TINY if options.tiny else []), *rest, "--device", options.device]
    config = parse_command_line([*words, "--train.save_every", "1000"]).config
    path = options.out / f"worth{'_tiny' if options.tiny else ''}.jsonl"
    append_line(path, {"name": options.name, "seed": config.train.seed} | measured(config))
    rows = [
        [
            line["name"],
            line["seed"],
            f"{100 * line['macro_f1']:.2f}",
            f"{line['loss']:.4f}",
            *("; ".join(f"{100 * share:.{n}f}" for share in line[key]) for key, n in (("load", 1), ("worth", 2))),
            f"{line['seconds']:.0f} s",
        ]
        for line in read_lines(path)
    ]
    print("Validation macro-F1 (%), and the points that each expert contributes, from the first to the last")
    print(table(["recipe", "seed", "macro-F1", "loss", "load (%)", "worth", "training"], rows))


def measured(config: Config) -> dict[str, Any]:
    """Train, and score the validation images with all experts and without each one."""
    inputs = load_inputs(config)
    with trained_run(config, inputs) as (trainer, seconds):
        found = predict(trainer.model, trainer.bank, "validation", removals=True)
        classes = inputs.splits.train.num_classes
        line = {**scores(found.labels_N, found.predicted_N, classes), "loss": found.loss(), "seconds": seconds}
        line["load"] = found.load_LE.mean(axis=0).tolist()
        without = found.removals and found.removals.predicted_EN
        lost = (
            () if without is None else removal(found.labels_N, found.predicted_N, without, classes)["macro_f1_change"]
        )
        return line | {"worth": [-float(change) for change in lost], "sizes": config.experts.labels()}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
