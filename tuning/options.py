"""The command line of tune.py, and what its --queue needs."""

import argparse

from common.arguments import Parser, add_shared_options, path_option
from common.errors import UserError
from common.text import printable
from config.config import Config
from tracking.queues import require_queue


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
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="number of parallel trials (default 1)")
    parser.add_argument("--queue", metavar="NAME", help="let the ClearML agents of this queue train, not this machine")
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


def require_agents(config: Config, queue: str) -> None:
    """Raise UserError if agents of a queue cannot train this configuration, EnvironmentFault if no server answers."""
    if config.tracking in ("none", "offline"):
        raise UserError(f"--queue {printable(queue)} needs a ClearML server: leave --tracking {config.tracking} out")
    if config.plugins:
        raise UserError("--plugins works only on this machine, and agents have none: leave it or --queue out")
    require_queue(queue)
    config.tracking = "clearml"
