"""The command line of predict.py."""

import argparse

from common.arguments import Parser, add_offload_options, add_shared_options, check_offload, path_option
from common.errors import UserError
from data.datasets import DATASETS

EXPLAINED = 12  # images in the figure
PORT = 7860  # gradio's default


def read_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; its help begins with the description. Raises UserError."""
    parser = Parser(prog="predict.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_option, metavar="RUN", help="run folder of train.py")
    parser.add_argument(
        "images",
        type=path_option,
        metavar="IMAGE",
        nargs="*",
        help="image files of any format that Pillow reads, or folders of them; they are cropped to the centre square "
        f"and resized to the resolution of the run's dataset ({', '.join(_sides())}; else its data.image_size)",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="number of classes to show (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument(
        "--explain",
        type=path_option,
        metavar="OUT.png",
        help=f"draw the first {EXPLAINED} images, their classes and experts",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="open a local web page that classifies the images you drop on it; needs gradio",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"with --serve: the port (default {PORT}; 0: any free port)"
    )
    parser.add_argument(
        "--reject",
        type=float,
        metavar="SHARE",
        help="mark images that are unlike the training images: farther from every class, in the frozen ViT's features, "
        "than all but this fraction of the validation images (such as 0.05); calibrated once on the run's dataset",
    )
    add_shared_options(parser, "backbone.weights", "data.root", "device")
    add_offload_options(parser)
    add_shared_options(parser, "plugins", "debug")
    options = parser.parse_intermixed_args(argv)  # IMAGE may come before and after options
    check_offload(parser, options)
    _check_serve(parser, options)
    if options.top < 1:
        raise UserError(f"--top is {options.top}: it must be at least 1")
    if options.reject is not None and not 0 < options.reject < 1:
        raise UserError(
            f"--reject is {options.reject}: it must be a fraction of the validation images, between 0 and 1"
        )
    if options.explain and options.explain.suffix.lower() != ".png":
        raise UserError(f"--explain {options.explain}: the name must end in .png")
    if options.explain and not options.explain.parent.is_dir():
        raise UserError(f"--explain {options.explain}: {options.explain.parent} is not a folder")
    return options


def _check_serve(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for options that --serve does not use, and for --port without --serve."""
    if options.serve and (options.images or options.json or options.explain):
        parser.error("--serve gets its images from the web page: leave out IMAGE, --json and --explain")
    if not options.serve and not options.images:
        parser.error("the following arguments are required: IMAGE, or --serve")
    if not options.serve and options.port is not None:
        parser.error("--port is for --serve: give both, or neither")
    options.port = PORT if options.port is None else options.port
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}: it must be from 0 to 65535")


def _sides() -> list[str]:
    """The image sizes of datasets with a fixed size, in words."""
    return [
        f"{found.side} pixels for {name}" + (", without colour" if found.grey else "")
        for name, found in sorted(DATASETS.items())
        if found.side
    ]
