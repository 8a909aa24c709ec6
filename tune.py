"""Search a recipe's options with Optuna: each trial is a training, and the validation images alone decide.

python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 30
python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 60 --jobs 4
python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 60 --jobs 4 --queue default
python train.py --config runs/tune-digits/best.yaml --seeds 5

The second command goes on where the first one stopped, or was interrupted; the third one has ClearML agents train the
trials. Options that are none of those below are train.py's.
"""

from common.errors import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # before the imports, which take seconds

import argparse
from pathlib import Path

from common.arguments import Parser, path_option
from common.distributed import require_alone
from common.errors import UserError, exit_code_of, exit_process
from common.signals import stoppable
from common.text import command, printable
from config.command_line import parse_command_line
from config.config import Config
from tracking.queues import require_queue
from tuning.search import search
from tuning.space import read_space
from tuning.study import StudyFolder, require_optuna
from tuning.worker import Plan


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: its own options, and the words that are train.py's. Raises UserError."""
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
    parser.add_argument("--trials", type=int, metavar="N", required=True, help="trials in all, those before included")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="trials at once (default 1)")
    parser.add_argument(
        "--queue", metavar="NAME", help="have the ClearML agents of this queue train them, not this machine"
    )
    parser.add_argument("--out", type=path_option, metavar="DIR", help="of the study (default: runs/tune-SPACE)")
    parser.add_argument("--storage", metavar="URL", help="database of Optuna (default: an SQLite file in DIR)")
    parser.add_argument("--no_pruning", action="store_true", help="let trials that are worse than most go on")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, words = parser.parse_known_args(argv)
    for name in ("trials", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: give 1 or more")
    for name in (word.partition("=")[0] for word in words):
        if name in ("--resume", "--seeds", "--run_dir"):
            parser.error(f"{name} is for train.py alone: trials have folders of their own in --out DIR")
    return options, words


def require_agents(config: Config, queue: str) -> None:
    """Raise UserError where agents of a queue cannot train this configuration, EnvironmentFault where none answers."""
    if config.tracking in ("none", "offline"):
        raise UserError(f"--queue {printable(queue)} needs a ClearML server: leave --tracking {config.tracking} out")
    if config.plugins:
        raise UserError("--plugins is for this machine, and agents have none: leave it or --queue out")
    require_queue(queue)
    config.tracking = "clearml"


def main() -> None:
    options, words = parse()
    require_alone("tune.py")
    require_optuna()
    with stoppable():
        config = parse_command_line(words).config
        if options.queue is not None:
            require_agents(config, options.queue)
        space = read_space(options.space)
        folder = StudyFolder(options.out or Path("runs") / f"tune-{options.space.stem}", options.storage)
        plan = Plan(folder, space, words, options.trials, not options.no_pruning, tracking=config.tracking)
        print(search(plan, options.jobs, options.queue))
        print(f"best options {printable(folder.best)}; {command('train.py', '--config', folder.best, '--seeds', 5)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
