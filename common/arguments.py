"""A command line whose mistakes end in one line."""

import argparse
import re

from common.errors import UserError

KINDS = {"int": "a whole number", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line."""

    def error(self, message: str):
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message):
            message = f"{found[1]} is {found[3]}: give {KINDS[found[2]]}"
        raise UserError(f"{message}; see python {self.prog} --help")
