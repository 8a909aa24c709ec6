"""Evaluate a trained run on its test set, or compare runs.

python evaluate.py RUN                      metrics.json, figures/*.png and report.html in RUN/evaluation/
python evaluate.py RUN --data.root DIR --backbone.weights FILE      if files have moved
python evaluate.py --compare RUN RUN ...    a table and a figure of run folders and ClearML task ids
"""

from common.errors import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # before the imports, which take seconds

import argparse
from pathlib import Path

from assembly.loading import offload_line, open_run
from assembly.pipeline import compile_blocks
from assembly.start import tags_of
from common.arguments import Parser, add_offload_options, check_offload, path_option
from common.distributed import require_alone
from common.errors import exit_code_of, exit_process
from common.plugins import add_plugins_option, load_plugins
from common.text import printable, quoted
from evaluation.evaluation import evaluate, expert_table, print_scores
from tracking.tracker import open_evaluation


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = Parser(
        prog="evaluate.py",
        usage="%(prog)s [options] RUN | --compare RUN RUN ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=path_option, metavar="RUN", nargs="?", help="run folder of train.py")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="evaluated runs, or ClearML task ids")
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", help="folder for the comparison (default: comparison)"
    )
    parser.add_argument(
        "--data.root", dest="root", type=path_option, metavar="DIR", help="folder of the dataset, if it has moved"
    )
    parser.add_argument(
        "--backbone.weights",
        dest="weights",
        type=path_option,
        metavar="FILE",
        help="the backbone's weights, if they have moved",
    )
    parser.add_argument(
        "--features.cache_dir",
        dest="cache_dir",
        type=path_option,
        metavar="DIR",
        help="folder for stored features; null: keep them in memory",
    )
    parser.add_argument(
        "--worth_images",
        type=int,
        metavar="N",
        help="ablate each expert in each single block on N test images (default: 2048 on a GPU, else 0)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    parser.add_argument(
        "--tracking",
        choices=("auto", "clearml", "none"),
        default="auto",
        metavar="MODE",
        help="auto (default): the server used in training; clearml; none",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        default=None,
        help="measure latency, also on a CPU (default: only on a GPU)",
    )
    add_offload_options(parser)
    add_plugins_option(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, rest = parser.parse_known_args(argv)
    if options.run is not None and rest and not rest[0].startswith("-"):
        runs = " ".join(map(quoted, (options.run, *rest)))
        parser.error(f"evaluate one RUN at a time, or compare several: --compare {runs}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if (options.run is None) == (options.compare is None):
        parser.error("name one RUN to evaluate, or two or more after --compare")
    check_offload(parser, options)
    if options.offload is not None and options.compare is not None:
        parser.error("--offload is for evaluating a RUN, not for --compare")
    of_one = {"data.root": "root", "backbone.weights": "weights", "features.cache_dir": "cache_dir"}
    for name, field in {**of_one, "worth_images": "worth_images", "latency": "latency"}.items():
        if options.compare is not None and getattr(options, field) is not None:
            parser.error(f"--{name} is for evaluating a RUN, not for --compare")
    if options.worth_images is not None and options.worth_images < 0:
        parser.error(f"--worth_images is {options.worth_images}: it must be a number of images, or 0 to skip this")
    if options.out is not None and options.compare is None:
        parser.error("--out needs --compare; a single run writes to RUN/evaluation")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is not a folder")
    return options


def main() -> None:
    options = parse()
    require_alone("evaluate.py")
    load_plugins(options.plugins)
    if options.compare:
        from evaluation.compare import compare  # here, because importing matplotlib takes a second

        out = options.out or Path("comparison")
        print(compare(options.compare, out))
        print(f"written to   {printable(out)}")
    else:
        score(options)


def score(options: argparse.Namespace) -> None:
    """Load the model of a run, evaluate it on the test set and write the results."""
    opened = open_run(
        options.run, options.device, options.root, options.weights, options.cache_dir, options.offload_memory
    )
    run, config, model = opened.run, opened.config, opened.model
    if opened.traffic is None:  # a compiled block cannot fetch experts
        compile_blocks(config, model, opened.inputs.device)
    named = {"name": run.path.name, "tags": tags_of(config)}
    with open_evaluation(options.tracking, run.path, config.to_dict(), **named) as tracker:
        if tracker.resends:
            tracker.model(run.weights, run.path.name, opened.inputs.splits.train.class_names)
        measure = (options.worth_images, options.latency, print_scores)
        found = evaluate(run, config, model, opened.bank, tracker, opened.inputs.backbone, *measure)
        print(expert_table(found))
    if opened.traffic is not None:
        print(offload_line(opened.traffic))
    print(f"written to   {printable(run.evaluation)}; open {run.report.name} in a browser")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
