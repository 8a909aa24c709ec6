"""What the command lines of evaluate.py and predict.py share."""

import argparse
import re

from errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line."""

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): invalid int value: (.*)", r"\1 is \2: give a whole number", message)
        raise UserError(f"{message}; see python {self.prog} --help")
