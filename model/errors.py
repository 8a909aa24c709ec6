"""What a user of the models can get wrong, each in one clear sentence.

`exit_code` is for a program that shows the sentence and ends.
"""


class InputError(ValueError):
    """A value that was given does not fit."""

    exit_code = 2


class UnavailableError(OSError):
    """The values are fine, but something they need is not on this machine, such as weights to be downloaded."""

    exit_code = 1


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on a single line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
