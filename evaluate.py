"""Score a trained run on its test set: numbers, a table, and figures under RUN/evaluation/.

python evaluate.py runs/cifar100-20260101-120000
python evaluate.py RUN --data.root DIR --backbone.weights FILE     where the files have moved
"""

import argparse
import sys
from pathlib import Path

from data.datasets import load_splits
from engine.arguments import Parser
from engine.checkpoint import check_inputs, load_exported
from engine.evaluation import evaluate, table
from engine.loading import configure, describe
from engine.pipeline import build_bank, build_model, identity, pick_device
from engine.run_folder import RunFolder
from engine.tracking import open_evaluation
from errors import exit_code_of
from model.backbone import load_backbone


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises errors.UserError."""
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--data.root", dest="root", type=Path, help="where the data set lies, if not where it was")
    parser.add_argument("--backbone.weights", dest="weights", type=Path, help="the backbone's file, if it has moved")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    parser.add_argument(
        "--tracking",
        choices=("auto", "clearml", "none"),
        default="auto",
        help="auto (default): also to ClearML, in a task under that of the training, if the training is on a server; "
        "clearml: always, with the training's curves where the server lacks them",
    )
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
    tags = [config.data.name, config.backbone.name, config.router.kind]
    with open_evaluation(options.tracking, run.path, config.to_dict(), name=run.path.name, tags=tags) as tracker:
        print(table(evaluate(run, config, model.to(device), bank, tracker)))
    print(f"written to   {run.evaluation}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
