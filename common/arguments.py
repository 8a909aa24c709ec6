"""Command-line parsing with one-line error messages."""

import argparse
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.memory import size_in_bytes
from common.paths import expanded
from common.plugins import HELP

KINDS = {"int": "a whole number", "float": "a number"}


def path_option(text: str) -> Path:
    """Type of an option that names a file or folder; ~ is expanded. Raises ArgumentTypeError."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size_option(text: str) -> int:
    """Type of an option that is an amount of memory, in bytes. Raises ArgumentTypeError."""
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


SHARED: dict[str, dict[str, Any]] = {
    "data.root": {
        "dest": "root",
        "type": path_option,
        "metavar": "DIR",
        "help": "folder of the dataset, if it has moved",
    },
    "backbone.weights": {
        "dest": "weights",
        "type": path_option,
        "metavar": "FILE",
        "help": "the backbone's weights, if they have moved",
    },
    "features.cache_dir": {
        "dest": "cache_dir",
        "type": path_option,
        "metavar": "DIR",
        "help": "folder for stored features; null: keep them in memory",
    },
    "device": {"default": "auto", "help": "auto (default), cpu, cuda, or cuda:1"},
    "plugins": {"action": "append", "default": [], "metavar": "FILE", "help": HELP.replace("%", "%%")},
    "debug": {"action": "store_true", "help": "show the traceback of an error"},
}
"""Options shared by several programs. The values of `plugins` go to common.plugins.load_plugins."""


def add_shared_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the named options of `SHARED`."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])


def add_offload_options(parser: argparse.ArgumentParser) -> None:
    """--offload cpu and --offload.memory SIZE, as `offload` and `offload_memory`: bytes, None without --offload."""
    parser.add_argument(
        "--offload",
        choices=("cpu",),
        metavar="cpu",
        help="keep the experts in host memory, and copy those that a batch chooses to the GPU",
    )
    parser.add_argument(
        "--offload.memory",
        dest="offload_memory",
        type=size_option,
        metavar="SIZE",
        help="with --offload: keep the most used experts on the GPU, up to this size, such as 512MB (default 0)",
    )


def check_offload(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Complete the options of `add_offload_options`. Raises UserError if one is missing for the other."""
    if options.offload is None and options.offload_memory is not None:
        parser.error("--offload.memory needs --offload cpu: give both, or neither")
    if options.offload is not None and options.offload_memory is None:
        options.offload_memory = 0


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str):
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message):
            message = f"{found[1]} is {found[3]}: give {KINDS[found[2]]}"
        raise UserError(f"{message}; see python {self.prog} --help")
