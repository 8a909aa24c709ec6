"""What the command lines of evaluate.py and predict.py share."""

import argparse

from errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see python {self.prog} --help")
