"""Score a trained run on its test set, or compare runs.

python evaluate.py RUN                      metrics.json, figures/*.png and report.html in RUN/evaluation/
python evaluate.py RUN --data.root DIR --backbone.weights FILE      where the files have moved
python evaluate.py --compare RUN RUN ...    one table and one figure, of run folders and ClearML task ids
"""

import argparse
import sys
from pathlib import Path

from data.datasets import load_splits
from engine.checkpoint import check_inputs, export_model, load_checkpoint, load_exported, read_description
from engine.compare import compare
from engine.config import Config, config_from_dict
from engine.evaluation import evaluate, table
from engine.pipeline import build_bank, build_model, identity, pick_device
from engine.run_folder import RunFolder
from errors import UserError, exit_code_of
from model.backbone import load_backbone


class Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see python {self.prog} --help")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises errors.UserError."""
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", nargs="?", help="folder that train.py wrote")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="runs that were evaluated, or ClearML task ids")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the comparison goes (default: comparison)")
    parser.add_argument(
        "--data.root", dest="root", type=Path, metavar="DIR", help="where the data set lies, if not where it was"
    )
    parser.add_argument(
        "--backbone.weights", dest="weights", type=Path, metavar="FILE", help="the backbone's, if it has moved"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    options = parser.parse_args(argv)
    if (options.run is None) == (options.compare is None):
        parser.error("name one RUN to score, or two or more after --compare")
    if options.out is not None and options.compare is None:
        parser.error("--out belongs to --compare; the files of a single run go to RUN/evaluation")
    return options


def main() -> None:
    options = parse()
    if options.compare:
        out = options.out or Path("comparison")
        print(compare(options.compare, out))
        print(f"written to   {out}")
    else:
        score(options)


def score(options: argparse.Namespace) -> None:
    """Rebuild the model of a run, score it on the test set and write what evaluate() writes."""
    run = RunFolder(options.run)
    described = describe(run)
    config = configure(described["config"], options)
    device = pick_device(config.device)
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device)
    feature_shape = tuple(described["feature_shape"])
    check_inputs(described, identity(config, splits, backbone, feature_shape), run.weights)
    bank = build_bank(config, splits, backbone, device)
    model = build_model(config, feature_shape, splits.test.num_classes)
    load_exported(run, model)
    print(table(evaluate(run, config, model.to(device), bank)))
    print(f"written to   {run.evaluation}; open {run.report.name} in a browser")


def describe(run: RunFolder) -> dict:
    """model.json, written first from the best checkpoint where training has not come to do that."""
    if not run.path.is_dir():
        raise UserError(f"{run.path} is not a folder: name a run that train.py wrote")
    if run.best.is_file():
        best = load_checkpoint(run.best)
        if not run.model.is_file() or read_description(run).get("epoch") != best["epoch"]:
            print(f"{run.path} was not trained to its end: scoring its best epoch so far, {best['epoch']}")
            export_model(run)
    elif not run.model.is_file():
        raise UserError(f"{run.path} holds neither model.json nor checkpoints/best.pt: name a run that train.py wrote")
    return read_description(run)


def configure(values: dict, options: argparse.Namespace) -> Config:
    """The run's configuration with the moved files and the device of this command line."""
    config = config_from_dict(values)
    config.device = options.device
    if options.root is not None:
        config.data.root = options.root.expanduser()
    if options.weights is not None:
        config.backbone.weights = options.weights.expanduser()
    return config


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
