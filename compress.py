"""Make a trained run smaller. The result is an ordinary run for evaluate.py, predict.py and train.py --resume.

python compress.py RUN --out RUN2 --prune 0 3                remove experts 0 and 3
python compress.py RUN --out RUN2 --prune auto --budget 0.3  remove experts while this costs at most 0.3 points
python compress.py RUN --out RUN2 --merge 2                  merge the experts to two
python compress.py RUN RUN ... --out RUN2 --distil dense     distil one or more runs into one dense part
python compress.py RUN --out RUN2 --quantise int8            store the experts in 8 bits
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

from functools import partial

from assembly.compress_options import plan_of, read_options
from assembly.compressing import compress, open_runs
from common.distributed import require_alone
from common.errors import exit_code_of, exit_process
from common.plugins import load_plugins
from common.signals import stoppable
from common.text import printable
from evaluation.compression import text
from evaluation.evaluation import table

parse = partial(read_options, __doc__)


def main() -> None:
    """Open the run, check the request, create the smaller run."""
    options = parse()
    require_alone("compress.py")
    load_plugins(options.plugins)
    plan = plan_of(options)
    with stoppable():
        opened, *others = open_runs(options, plan)
        results = compress(opened, plan, options.out, others)
        print(f"\n{table(results)}\n\n{text(results['compression'])}\nrun folder   {printable(options.out)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
