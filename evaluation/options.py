"""The command line of evaluate.py."""

import argparse

from common.arguments import Parser, add_offload_options, add_shared_options, check_offload, path_option
from common.text import quoted


def read_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; its help begins with the description. Raises UserError."""
    parser = Parser(
        prog="evaluate.py",
        usage="%(prog)s [options] RUN | --compare RUN RUN ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=path_option, metavar="RUN", nargs="?", help="run folder of train.py")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="evaluated runs, or ClearML task ids")
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", help="folder for the comparison (default: comparison)"
    )
    add_shared_options(parser, "data.root", "backbone.weights", "features.cache_dir")
    parser.add_argument(
        "--worth_images",
        type=int,
        metavar="N",
        help="ablate each expert in each single block on N test images (default: 2048 on a GPU, else 0)",
    )
    add_shared_options(parser, "device")
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
    add_shared_options(parser, "plugins", "debug")
    options, rest = parser.parse_known_args(argv)
    if options.run is not None and rest and not rest[0].startswith("-"):
        runs = " ".join(map(quoted, (options.run, *rest)))
        parser.error(f"evaluate one RUN at a time, or compare several: --compare {runs}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _check(parser, options)
    return options


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together, or are out of range."""
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
