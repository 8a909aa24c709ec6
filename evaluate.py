"""Score a trained run on its test set, or compare runs.

python evaluate.py RUN                      metrics.json, figures/*.png and report.html in RUN/evaluation/
python evaluate.py RUN --data.root DIR --backbone.weights FILE      where the files have moved
python evaluate.py --compare RUN RUN ...    one table and one figure, of run folders and ClearML task ids
"""

from common.errors import leave_on_signal
from common.network import reachable

if __name__ == "__main__":
    leave_on_signal()  # before the imports, which take seconds

import argparse
from pathlib import Path

from assembly.loading import configure, describe, offload_line, place
from assembly.pipeline import build_bank, build_model, compile_blocks, identity, pick_device
from common.arguments import Parser, add_offload_options, check_offload, path_option
from common.errors import blaming_files, exit_code_of, leave
from common.plugins import add_plugins_option, load_plugins
from common.text import printable, quoted
from data.datasets import load_splits
from evaluation.evaluation import evaluate, table
from model.backbone import load_backbone
from storage.checkpoint import check_inputs
from storage.export import load_exported
from storage.folder import RunFolder
from tracking.tracker import open_evaluation


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = Parser(
        prog="evaluate.py",
        usage="%(prog)s [options] RUN | --compare RUN RUN ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=path_option, metavar="RUN", nargs="?", help="folder that train.py wrote")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="runs that were evaluated, or ClearML task ids")
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", help="where the comparison goes (default: comparison)"
    )
    parser.add_argument(
        "--data.root", dest="root", type=path_option, metavar="DIR", help="where the data set lies, if not where it was"
    )
    parser.add_argument(
        "--backbone.weights", dest="weights", type=path_option, metavar="FILE", help="the backbone's, if it has moved"
    )
    parser.add_argument(
        "--features.cache_dir",
        dest="cache_dir",
        type=path_option,
        metavar="DIR",
        help="where features are stored; null: in memory only",
    )
    parser.add_argument(
        "--worth_images",
        type=int,
        metavar="N",
        help="inside the ViT: remove each expert from single blocks on N test images (default: 2048 on a GPU, else 0)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    parser.add_argument(
        "--tracking",
        choices=("auto", "clearml", "none"),
        default="auto",
        metavar="MODE",
        help="auto (default): the training's server; clearml; none",
    )
    add_offload_options(parser)
    add_plugins_option(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, rest = parser.parse_known_args(argv)
    if options.run is not None and rest and not rest[0].startswith("-"):
        runs = " ".join(map(quoted, (options.run, *rest)))
        parser.error(f"one RUN is scored at a time, several are compared: --compare {runs}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if (options.run is None) == (options.compare is None):
        parser.error("name one RUN to score, or two or more after --compare")
    check_offload(parser, options)
    if options.offload is not None and options.compare is not None:
        parser.error("--offload is for scoring a RUN, not for --compare")
    if options.worth_images is not None and options.worth_images < 0:
        parser.error(f"--worth_images is {options.worth_images}: it is a number of images, 0 for none")
    if options.out is not None and options.compare is None:
        parser.error("--out belongs to --compare; the files of a single run go to RUN/evaluation")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is not a folder")
    return options


def main() -> None:
    options = parse()
    load_plugins(options.plugins)
    if options.compare:
        from evaluation.compare import compare  # here, because importing what draws takes a second

        out = options.out or Path("comparison")
        print(compare(options.compare, out))
        print(f"written to   {printable(out)}")
    else:
        score(options)


def score(options: argparse.Namespace) -> None:
    """Rebuild the model of a run, score it on the test set and write what evaluate() writes."""
    run = RunFolder(options.run)
    described = describe(run)
    config = configure(described["config"], options.device, options.root, options.weights)
    if options.cache_dir is not None:
        config.features.cache_dir = None if str(options.cache_dir) == "null" else options.cache_dir.absolute()
    device = pick_device(config.device)
    splits = load_splits(config.data)
    with blaming_files():
        backbone = load_backbone(config.backbone, device, reachable)
    bank = build_bank(config, splits, backbone, device)
    with blaming_files():
        check_inputs(described, identity(config, splits, backbone, bank.feature_shape), run.weights)
        model = build_model(config, bank.feature_shape, splits.test.num_classes, backbone)
        load_exported(run, model, described.get("weights_sha256"))
        traffic = place(model, device, options.offload_memory)
        if traffic is None:  # a compiled block cannot bring experts
            compile_blocks(config, model, device)
    tags = [config.data.name, config.backbone.name, config.router.kind]
    with open_evaluation(options.tracking, run.path, config.to_dict(), name=run.path.name, tags=tags) as tracker:
        if tracker.sends_again:
            tracker.model(run.weights, name=run.path.name)
        print(table(evaluate(run, config, model, bank, tracker, backbone, options.worth_images)))
    if traffic is not None:
        print(offload_line(traffic))
    print(f"written to   {printable(run.evaluation)}; open {run.report.name} in a browser")


if __name__ == "__main__":
    leave(exit_code_of(main, lasting=True))
