"""The command line of compress.py."""

import argparse

from assembly.compression_steps import AUTO, CALIBRATIONS, Plan
from common.arguments import Parser, add_shared_options, path_option
from common.errors import UserError
from common.files import require_place
from common.text import printable
from config.config import Config
from config.values import convert, expected, option_types
from tracking.tracker import MODES


def read_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; its help starts with the description. Raises UserError."""
    parser = Parser(prog="compress.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        type=path_option,
        metavar="RUN",
        nargs="+",
        help="run folder of train.py; several: an ensemble of teachers",
    )
    parser.add_argument("--out", type=path_option, metavar="RUN2", required=True, help="folder of the smaller run")
    parser.add_argument(
        "--prune",
        nargs="+",
        metavar="E",
        help="remove these experts, numbered from 0, in all blocks; auto: one after another within the budget",
    )
    parser.add_argument(
        "--merge",
        type=int,
        metavar="N",
        help="merge the experts to N: average each of the N most used experts with those of similar router logits",
    )
    parser.add_argument(
        "--distil",
        choices=("dense", "sparse"),
        help="train a smaller student. dense: one part for all samples, with the FLOPs of the mixture; sparse: the "
        "result of --prune and --merge, or a new mixture with half of the hidden units",
    )
    parser.add_argument(
        "--distil.sizes",
        dest="sizes",
        metavar="SIZES",
        help="experts of the new student, as experts.sizes: [[64],[128]]",
    )
    parser.add_argument(
        "--distil.epochs",
        dest="epochs",
        type=int,
        metavar="N",
        help="epochs of the student (default: those of the run)",
    )
    parser.add_argument(
        "--distil.temperature",
        dest="temperature",
        type=float,
        metavar="T",
        help="temperature of both softmaxes (default 2)",
    )
    parser.add_argument(
        "--distil.weight",
        dest="weight",
        type=float,
        metavar="W",
        help="weight of the teachers in the loss; the rest is the weight of the labels (default 0.7)",
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
        help="keep these experts in 16 bits, numbered as the remaining experts; auto: the most sensitive ones, as few "
        "as the budget needs",
    )
    parser.add_argument(
        "--quantise.calibrate",
        dest="calibrate",
        choices=CALIBRATIONS,
        help="data for choosing the scales: equal rows per expert (default), rows as the gate sends them, or none",
    )
    parser.add_argument(
        "--quantise.rows",
        dest="rows",
        type=int,
        metavar="N",
        help="rows (images, or tokens inside the ViT) per expert and block for choosing the scales (default 1024)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="points of validation macro-F1 that all automatic steps together may lose (default 0.3)",
    )
    add_shared_options(parser, "data.root", "backbone.weights", "features.cache_dir", "device")
    parser.add_argument("--tracking", choices=MODES, metavar="MODE", help="as in train.py (default: that of the run)")
    add_shared_options(parser, "plugins", "debug")
    options = parser.parse_args(argv)
    if all(getattr(options, name) is None for name in ("prune", "merge", "distil", "quantise")):
        parser.error("nothing to do: name --prune, --merge, --distil or --quantise")
    _check_use(parser, options)
    _check_distil(parser, options)
    if options.rows is not None and options.rows < 1:
        parser.error(f"--quantise.rows is {options.rows}: it must be at least 1")
    options.prune = _experts_of("--prune", options.prune)
    options.protect = _experts_of("--quantise.protect", options.protect)
    if options.budget is not None and not 0 <= options.budget <= 100:
        parser.error(f"--budget is {options.budget:g}: it must be from 0 to 100 points of macro-F1")
    if options.budget is not None and AUTO not in (options.prune, options.protect):
        parser.error(f"--budget needs --prune {AUTO} or --quantise.protect {AUTO}: add one of them")
    return options


def _check_use(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options of a step that is not requested."""
    if options.distil is None and len(options.runs) > 1:
        parser.error("several RUNs are an ensemble of teachers for --distil: add it, or name one RUN")
    for step, names in {
        "distil": ("sizes", "epochs", "temperature", "weight"),
        "quantise": ("protect", "calibrate", "rows"),
    }.items():
        for name in names:
            if getattr(options, step) is None and getattr(options, name) is not None:
                parser.error(f"--{step}.{name} needs --{step}: add it, or leave this option out")


def _check_distil(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options of a student that are out of range; parse its sizes."""
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
        parser.error(f"--distil.weight is {options.weight:g}: it must be from 0 to 1")


def _experts_of(option: str, words: list[str] | None) -> list[int] | str | None:
    """The experts that an option names, without duplicates, or AUTO. Raises UserError."""
    if words is None or words == [AUTO]:
        return words and AUTO
    if not all(word.isdecimal() for word in words):
        wrong = next(word for word in words if not word.isdecimal())
        raise UserError(f"{option} has {printable(wrong)}: give expert numbers, from 0, or only {AUTO}")
    return sorted({int(word) for word in words})


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan of the options. Raises UserError if --out exists, or no folder can be created there."""
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: name a new folder")
    require_place(options.out, "--out")
    given = {name: getattr(options, name, None) for name in Plan.__dataclass_fields__}
    return Plan(**{name: value for name, value in given.items() if value is not None})
