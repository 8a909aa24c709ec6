"""Export a trained run to one file that other programs can run without this project.

python export.py runs/cifar100-20260101-120000 model.onnx      for ONNX Runtime and other programs that read ONNX
python export.py RUN model.pt2                                 for torch.export.load
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

import argparse

from assembly.loading import load_trained
from common.arguments import Parser, add_shared_options, path_option
from common.distributed import require_alone
from common.errors import exit_code_of, exit_process, say
from common.plugins import load_plugins
from common.signals import stoppable
from common.text import printable
from deployment.export import BATCHES, check_target, export


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_option, metavar="RUN", help="run folder of train.py")
    parser.add_argument("out", type=path_option, metavar="OUT", help="output file: OUT.onnx or OUT.pt2")
    add_shared_options(parser, "backbone.weights", "plugins", "debug")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    require_alone("export.py")
    load_plugins(options.plugins)
    check_target(options.out)
    with stoppable():
        trained = load_trained(options.run, "cpu", options.weights, say=say)
        checked = export(trained, options.out)
    batches = ", ".join(map(str, BATCHES))
    print(f"checked      against the run with batches of {batches}: probabilities within {checked.probabilities:.1g}")
    if checked.undecided:
        print(f"             except in {checked.undecided} of {sum(BATCHES)} images: a token chose another expert")
    print(f"written to   {printable(options.out)}, {checked.bytes / 1e6:,.1f} MB; docs/export.md shows how to run it")


if __name__ == "__main__":
    exit_process(exit_code_of(main))
