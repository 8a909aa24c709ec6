"""Score a trained run on its test set: numbers, a table, and figures under RUN/evaluation/.

python evaluate.py runs/cifar100-20260101-120000
python evaluate.py RUN --data.root DIR --backbone.weights FILE     where the files have moved
"""

import argparse
import sys
from pathlib import Path

from data.datasets import load_splits
from engine.checkpoint import check_inputs, load_exported
from engine.evaluation import evaluate, table
from engine.loading import configure, describe
from engine.pipeline import build_bank, build_model, identity, pick_device
from engine.run_folder import RunFolder
from errors import Parser, exit_code_of
from model.backbone import load_backbone


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises errors.UserError."""
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--data.root", dest="root", type=Path, help="where the data set lies, if not where it was")
    parser.add_argument("--backbone.weights", dest="weights", type=Path, help="the backbone's file, if it has moved")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    run = RunFolder(options.run)
    described = describe(run)
    config = configure(described["config"], options.device, options.root, options.weights)
    device = pick_device(config.device)
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device)
    feature_shape = tuple(described["feature_shape"])
    check_inputs(described, identity(config, splits, backbone, feature_shape), run.weights)
    bank = build_bank(config, splits, backbone, device)
    model = build_model(config, feature_shape, splits.test.num_classes)
    load_exported(run, model)
    print(table(evaluate(run, config, model.to(device), bank)))
    print(f"written to   {run.evaluation}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
