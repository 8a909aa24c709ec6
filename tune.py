"""Search a recipe's options with Optuna. Each trial is one training run, scored on the validation images.

python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 30
python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 60 --jobs 4
python tune.py --config configs/digits.yaml --space configs/spaces/digits.yaml --trials 60 --jobs 4 --queue default
python train.py --config runs/tune-digits/best.yaml --seeds 5

The second command continues where the first one stopped or was interrupted. In the third one ClearML agents train the
trials. All other options are those of train.py.
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

import sys
from functools import partial
from pathlib import Path

from common.distributed import require_alone
from common.errors import exit_code_of, exit_process
from common.files import require_place
from common.signals import stoppable
from common.text import command, printable
from config.command_line import parse_command_line
from tuning.clone import study_words
from tuning.options import read_options, require_agents
from tuning.search import check_study, search
from tuning.space import read_space
from tuning.study import StudyFolder, require_optuna
from tuning.worker import Plan

parse = partial(read_options, __doc__)


def main() -> None:
    options, words = parse(study_words(sys.argv[1:]))
    require_alone("tune.py")
    require_optuna()
    with stoppable():
        config = parse_command_line(words).config
        if options.queue is not None:
            require_agents(config, options.queue)
        space = read_space(options.space)
        folder = StudyFolder(options.out or Path("runs") / f"tune-{options.space.stem}", options.storage)
        require_place(folder.path, "--out")
        if options.queue is None:  # agents have files of their own
            check_study(config, space)
        plan = Plan(folder, space, words, options.trials, not options.no_pruning, tracking=config.tracking)
        print(search(plan, options.jobs, options.queue))
        print(f"best options {printable(folder.best)}; {command('train.py', '--config', folder.best, '--seeds', 5)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
