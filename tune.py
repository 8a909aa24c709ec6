"""Search a recipe's options with Optuna. Each trial is one training run, scored on the validation images.

python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 30
python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 60 --jobs 4
python train.py --config runs/tune-digits/best.yaml --seeds 5

The second command continues where the first one stopped or was interrupted. All other options are those of train.py.
"""

from common.errors import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # before the imports, which take seconds

import argparse
from pathlib import Path

from common.arguments import Parser, path_option
from common.distributed import require_alone
from common.errors import exit_code_of, exit_process
from common.signals import stoppable
from common.text import command, printable
from config.command_line import parse_command_line
from tuning.search import search
from tuning.space import read_space
from tuning.study import StudyFolder, require_optuna
from tuning.worker import Plan


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: the options of tune.py, and the remaining words for train.py. Raises UserError."""
    parser = Parser(
        prog="tune.py",
        usage="%(prog)s --space SPACE.yaml --trials N [options] [--config FILE] [--section.option VALUE ...]",
        description=__doc__,
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, words = parser.parse_known_args(argv)
    for name in ("trials", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: give 1 or more")
    for name in (word.partition("=")[0] for word in words):
        if name in ("--resume", "--seeds", "--run_dir"):
            parser.error(f"{name} works only with train.py: trials have their own folders in --out DIR")
    return options, words


def main() -> None:
    options, words = parse()
    require_alone("tune.py")
    require_optuna()
    with stoppable():
        config = parse_command_line(words).config
        space = read_space(options.space)
        folder = StudyFolder(options.out or Path("runs") / f"tune-{options.space.stem}", options.storage)
        plan = Plan(folder, space, words, options.trials, not options.no_pruning, tracking=config.tracking)
        print(search(plan, options.jobs))
        print(f"best options {printable(folder.best)}; {command('train.py', '--config', folder.best, '--seeds', 5)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
