"""The errors that a user can cause: one line that says what is wrong, where, and what to do."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something in the user's input is wrong; the message is one clear line and the exit code is 2."""

    exit_code = 2


class EnvironmentFault(UserError):
    """The input is fine but the machine is not (no network, full disk, dead server); the exit code is 1."""

    exit_code = 1


def exit_code_of(main: Callable[[], None]) -> int:
    """Run a program: 0, or the code of its UserError, whose one line goes to standard error."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
