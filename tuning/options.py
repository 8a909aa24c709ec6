"""The command line of tune.py."""

import argparse

from common.arguments import Parser, add_shared_options, path_option


def read_options(description: str, argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: the options of tune.py, and the remaining words for train.py. Raises UserError."""
    parser = Parser(
        prog="tune.py",
        usage="%(prog)s --space SPACE.yaml --trials N [options] [--config FILE] [--section.option VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--space",
        type=path_option,
        metavar="FILE",
        required=True,
        help="YAML file with a list of values, or {low, high, log}, for each option that is searched",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", required=True, help="total number of trials, including earlier ones"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=1, help="number of parallel trials on this machine (default 1)"
    )
    parser.add_argument("--out", type=path_option, metavar="DIR", help="folder of the study (default: runs/tune-SPACE)")
    parser.add_argument("--storage", metavar="URL", help="Optuna database (default: an SQLite file in DIR)")
    parser.add_argument("--no_pruning", action="store_true", help="do not stop trials that are below the median")
    add_shared_options(parser, "debug")
    options, words = parser.parse_known_args(argv)
    for name in ("trials", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: give 1 or more")
    for name in (word.partition("=")[0] for word in words):
        if name in ("--resume", "--seeds", "--run_dir"):
            parser.error(f"{name} works only with train.py: trials have their own folders in --out DIR")
    return options, words
