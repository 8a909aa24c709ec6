"""Command-line parsing with one-line error messages."""

import argparse
import re
from pathlib import Path

from common.errors import UserError
from common.paths import expanded

KINDS = {"int": "a whole number", "float": "a number"}


def path_option(text: str) -> Path:
    """Type of an option that names a file or folder; ~ is expanded. Raises ArgumentTypeError."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str):
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message):
            message = f"{found[1]} is {found[3]}: give {KINDS[found[2]]}"
        raise UserError(f"{message}; see python {self.prog} --help")
