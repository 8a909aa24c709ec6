"""Make a trained run smaller: a run like any other, which evaluate.py, predict.py and train.py --resume take.

python compress.py RUN --out RUN2 --prune 0 3                without experts 0 and 3
python compress.py RUN --out RUN2 --prune auto --budget 0.3  without all whose removal costs 0.3 points at most
python compress.py RUN --out RUN2 --merge 2                  its experts merged to two
python compress.py RUN RUN ... --out RUN2 --distil dense     one dense part, taught by one or more runs
python compress.py RUN --out RUN2 --quantise int8            its experts in 8 bits
"""

from common.errors import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # before the imports, which take seconds

import argparse

from assembly.compressing import check_plan, compress
from assembly.compression_steps import AUTO, CALIBRATIONS, Plan
from assembly.loading import configure, open_run
from common.arguments import Parser, path_option
from common.distributed import require_alone
from common.errors import UserError, exit_code_of, exit_process
from common.files import require_place
from common.plugins import add_plugins_option, load_plugins
from common.signals import stoppable
from common.text import printable
from config.config import Config
from config.values import convert, expected, option_types
from evaluation.compression import text
from evaluation.evaluation import table
from storage.described import describe
from storage.folder import RunFolder
from tracking.tracker import MODES


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = Parser(prog="compress.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=path_option, metavar="RUN", nargs="+", help="folder that train.py wrote; more than one: they teach"
    )
    parser.add_argument("--out", type=path_option, metavar="RUN2", required=True, help="folder of the smaller run")
    parser.add_argument(
        "--prune",
        nargs="+",
        metavar="E",
        help="remove these experts, numbered from 0, in all blocks; auto: one after the other while the budget lasts",
    )
    parser.add_argument(
        "--merge",
        type=int,
        metavar="N",
        help="merge the experts to N: the most used ones, each averaged with those whose gate is most like its own",
    )
    parser.add_argument(
        "--distil",
        choices=("dense", "sparse"),
        help="teach a smaller model: dense: one part for all samples, at the cost of the mixture; sparse: what --prune "
        "and --merge have left, or a new mixture of half the hidden units",
    )
    parser.add_argument(
        "--distil.sizes",
        dest="sizes",
        metavar="SIZES",
        help="experts of the new student, as experts.sizes: [[64],[128]]",
    )
    parser.add_argument("--distil.epochs", dest="epochs", type=int, metavar="N", help="default: as many as the run has")
    parser.add_argument(
        "--distil.temperature",
        dest="temperature",
        type=float,
        metavar="T",
        help="of both softmaxes (default 2)",
    )
    parser.add_argument(
        "--distil.weight",
        dest="weight",
        type=float,
        metavar="W",
        help="share of the teachers in the loss, the rest is of the labels (default 0.7)",
    )
    parser.add_argument(
        "--quantise",
        choices=("int8", "fp8"),
        help="store the matrices of the experts and of the linear head in 8 bits, with a scale for each output channel",
    )
    parser.add_argument(
        "--quantise.protect",
        dest="protect",
        nargs="+",
        metavar="E",
        help="keep these experts in 16 bits, numbered as those that are left; auto: those that would lose most, as few "
        "as keep to the budget",
    )
    parser.add_argument(
        "--quantise.calibrate",
        dest="calibrate",
        choices=CALIBRATIONS,
        help="what scales are chosen on: equal rows for each expert (default), rows as the gate sends them, or none",
    )
    parser.add_argument(
        "--quantise.rows",
        dest="rows",
        type=int,
        metavar="N",
        help="rows (images, inside the ViT tokens) for each expert and block to choose the scales on (default 1024)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="points of validation macro-F1 that each automatic step may lose (default 0.3)",
    )
    parser.add_argument("--data.root", dest="root", type=path_option, metavar="DIR", help="where the data set lies")
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
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
    parser.add_argument("--tracking", choices=MODES, metavar="MODE", help="as of train.py (default: the run's own)")
    add_plugins_option(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    if all(getattr(options, name) is None for name in ("prune", "merge", "distil", "quantise")):
        parser.error("nothing to do: name --prune, --merge, --distil or --quantise")
    _check_use(parser, options)
    _check_distil(parser, options)
    if options.rows is not None and options.rows < 1:
        parser.error(f"--quantise.rows is {options.rows}: it is a number of rows, at least 1")
    options.prune = experts_of("--prune", options.prune)
    options.protect = experts_of("--quantise.protect", options.protect)
    if options.budget is not None and not 0 <= options.budget <= 100:
        parser.error(f"--budget is {options.budget:g}: it is points of macro-F1, from 0 to 100")
    if options.budget is not None and AUTO not in (options.prune, options.protect):
        parser.error(f"--budget is for --prune {AUTO} and --quantise.protect {AUTO}: name one of these")
    return options


def _check_use(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options of a step that is not asked for."""
    if options.distil is None and len(options.runs) > 1:
        parser.error("several RUNs are for --distil, which they teach together: name that too")
    for step, names in {
        "distil": ("sizes", "epochs", "temperature", "weight"),
        "quantise": ("protect", "calibrate", "rows"),
    }.items():
        for name in names:
            if getattr(options, step) is None and getattr(options, name) is not None:
                parser.error(f"--{step}.{name} is for --{step}: name that too")


def _check_distil(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options of a student that are out of range; read its sizes."""
    if options.sizes is not None:
        kind = option_types(Config)["experts.sizes"]
        try:
            options.sizes = convert(kind, options.sizes)
        except ValueError:
            parser.error(f"--distil.sizes is {printable(options.sizes)}: give {expected(kind)}")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--distil.epochs is {options.epochs}: it must be at least 1")
    if options.temperature is not None and not 0.01 <= options.temperature <= 1000:
        parser.error(f"--distil.temperature is {options.temperature:g}: it must be from 0.01 to 1000")
    if options.weight is not None and not 0 <= options.weight <= 1:
        parser.error(f"--distil.weight is {options.weight:g}: it is a share, from 0 to 1")


def experts_of(option: str, words: list[str] | None) -> list[int] | str | None:
    """The experts that an option names, each once, or AUTO. Raises UserError."""
    if words is None or words == [AUTO]:
        return words and AUTO
    if not all(word.isdecimal() for word in words):
        wrong = next(word for word in words if not word.isdecimal())
        raise UserError(f"{option} has {printable(wrong)}: give numbers of experts, from 0, or {AUTO} alone")
    return sorted({int(word) for word in words})


def main() -> None:
    """Open the run, check what is asked of it, make the smaller one."""
    options = parse()
    require_alone("compress.py")
    load_plugins(options.plugins)
    names = ("prune", "merge", "distil", "epochs", "sizes", "temperature", "weight")
    names += ("quantise", "protect", "calibrate", "rows", "budget")
    plan = Plan(**{name: value for name in names if (value := getattr(options, name)) is not None})
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: name a new folder")
    require_place(options.out, "--out")
    with stoppable():
        run = RunFolder(options.runs[0])
        check_plan(configure(describe(run)["config"], options.device, options.root, options.weights), plan)
        places = (options.device, options.root, options.weights, options.cache_dir)
        opened, *others = [open_run(path, *places) for path in options.runs]
        if options.tracking is not None:
            opened.config.tracking = options.tracking
        results = compress(opened, plan, options.out, others)
        print(f"\n{table(results)}\n\n{text(results['compression'])}\nrun folder   {printable(options.out)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
