"""Errors end a program with one line that says what is wrong, where, and how to fix it; --debug adds a traceback."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from common.imports import pause_collection, resume_collection
from common.text import printable

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """Something in the user's input is wrong; the message is one clear line and the exit code is 2."""

    exit_code = 2


class CommandError(UserError):
    """A file needs an option that only the command line can give, such as --plugins."""


class EnvironmentFault(UserError):
    """The input is right but the machine fails (no network, full disk, server down); the exit code is 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; the exit code is 128 + its number."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def begin_program() -> None:
    """Prepare a program for its imports, which take seconds: Ctrl-C and SIGTERM end it with one line, not a traceback.

    The garbage collector pauses until `exit_code_of`.
    """
    pause_collection()

    def exit_now(number: int, _frame: object) -> None:
        if os.environ.get("RANK", "0") == "0":  # of several processes only one reports it
            say(f"interrupted by {signal.Signals(number).name}")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, exit_now)


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error whose message is meant for the user; None for other errors."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) else None


@contextmanager
def as_environment_fault() -> Iterator[None]:
    """Raise EnvironmentFault for each UserError inside: a file of a run is wrong, not the command line."""
    try:
        yield
    except Exception as error:
        if exit_code(error) != UserError.exit_code or isinstance(error, CommandError):
            raise
        raise EnvironmentFault(str(error)) from error


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on a single line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def say(message: str) -> None:
    """Print one line to standard error, with control characters escaped; ignore a closed terminal."""
    if sys.stderr is not None:
        with suppress(OSError):
            _write(sys.stderr, f"{printable(message)}\n")
            sys.stderr.flush()


def warn(message: str) -> None:
    """Print a warning; the program continues."""
    say(f"warning: {message}")


def _write(stream: TextIO, text: str) -> None:
    """Write text to a stream, escaping the characters that its encoding does not have."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _Output:
    """Standard output that handles a full disk, an encoding without some characters, and a closed pipe.

    keep_going: drop what cannot be written and continue; `finish` raises the error. Otherwise it is raised at once.
    """

    def __init__(self, stream: TextIO | None, keep_going: bool):
        # None: standard output was closed when the program started.
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.keep_going = keep_going
        self._lost: Exception | None = None

    def write(self, text: str) -> int:
        self._attempt(_write, self.stream, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            with suppress(OSError):  # else the buffered text fails again when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            remedy = "the rest of the work is done" if self.keep_going else "redirect it elsewhere"
            full = EnvironmentFault(f"standard output cannot be written: {error.strerror}; {remedy}")
            self._lost = self._lost or (error if isinstance(error, BrokenPipeError) else full)
            if not self.keep_going:
                raise self._lost from error

    def finish(self) -> None:
        """Flush; raise the error of any line that could not be written."""
        self.flush()
        if self._lost is not None:
            raise self._lost

    def drop(self) -> None:
        """Flush what can be written without raising: the program already ends with another error."""
        self.keep_going = True
        self.flush()


def exit_code_of(main: Callable[[], None], keep_going: bool = False) -> int:
    """Run a program and return its exit code; an error is printed in one line on standard error.

    With --debug the traceback is printed first. keep_going: a full or closed standard output does not stop a program
    whose results are files; the exit code is still 1.
    """
    resume_collection()
    sys.stdout = output = _Output(sys.stdout, keep_going)
    try:
        return _run(main, output)
    finally:
        output.drop()
        sys.stdout = output.stream


def _run(main: Callable[[], None], output: _Output) -> int:
    debug = "--debug" in sys.argv[1:]
    try:
        try:
            main()
        except SystemExit as ended:  # --help exits this way; its output may be unwritable too
            if ended.code:
                raise
        output.finish()
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted by SIGINT")
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader closed the pipe, as head does
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explained(error)
        say(f"error: {message}" + ("" if debug or exit_code(error) is not None else "; --debug shows the traceback"))
        return code
    return 0


def exit_process(code: int) -> NoReturn:
    """End the process; after a signal or an error at once.

    Threads may still extract features or compute a fingerprint. Python would wait for them, or stop them inside
    PyTorch's code, which then aborts the process with an exit code of its own.
    """
    if code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def explained(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of an exception."""
    if (code := exit_code(error)) is not None:
        return str(error), code
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(m in str(error) for m in MEMORY)):
        remedy = "lower --train.batch_size or --features.batch_size, use fewer or smaller images and experts"
        return f"out of memory ({one_line(error, 120) or 'on the host'}): {remedy}", 1
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}; free the disk, fix the path or its permissions, and run again", 1
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f"unexpected {type(error).__name__} in {frame.filename}:{frame.lineno}: {one_line(error)}", 1
