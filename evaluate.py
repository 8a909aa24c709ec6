"""Evaluate a trained run on its test set, or compare runs.

python evaluate.py RUN                      metrics.json, figures/*.png and report.html in RUN/evaluation/
python evaluate.py RUN --data.root DIR --backbone.weights FILE      if files have moved
python evaluate.py --compare RUN RUN ...    a table and a figure of run folders and ClearML task ids
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

import sys
from functools import partial
from pathlib import Path

from assembly.scoring import score
from common.distributed import require_alone
from common.errors import exit_code_of, exit_process
from common.plugins import load_plugins
from common.text import printable
from evaluation.options import read_options
from tracking.agent import evaluation_words

parse = partial(read_options, __doc__)


def main() -> None:
    options = parse(evaluation_words(sys.argv[1:]))
    require_alone("evaluate.py")
    load_plugins(options.plugins)
    if options.compare:
        from evaluation.compare import compare  # here, because importing matplotlib takes a second

        out = options.out or Path("comparison")
        print(compare(options.compare, out))
        print(f"written to   {printable(out)}")
    else:
        score(options)


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
