"""Errors for users of the models, each one clear sentence.

A program that prints the sentence ends with `exit_code`.
"""


class InputError(ValueError):
    """A given value is invalid."""

    exit_code = 2


class UnavailableError(OSError):
    """The values are valid, but something is missing on this machine, such as weights that cannot be downloaded."""

    exit_code = 1


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on a single line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
