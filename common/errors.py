"""How a program ends: one line that says what is wrong, where, and what to do; a traceback only with --debug."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from common.text import printable

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """Something in the user's input is wrong; the message is one clear line and the exit code is 2."""

    exit_code = 2


class CommandError(UserError):
    """What a file asks for has to be said on the command line, whatever is wrong with the file."""


class EnvironmentFault(UserError):
    """The input is fine but the machine is not (no network, full disk, dead server); the exit code is 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; the exit code is 128 + its number."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def leave_on_signal() -> None:
    """Let Ctrl-C and SIGTERM end a program that is still importing, in one line in place of a traceback."""

    def leave_now(number: int, _frame: object) -> None:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            say(f"interrupted by {signal.Signals(number).name}")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave_now)


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error whose text is one clear line for the user, of whatever room; None for others."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) else None


@contextmanager
def blaming_files() -> Iterator[None]:
    """Inside, what is wrong is a file of a run, not the command line: exit code 1 in place of 2."""
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
    """One line on standard error, whatever names are in it; a terminal that is gone is no reason to fail."""
    if sys.stderr is not None:
        with suppress(OSError):
            _write(sys.stderr, f"{printable(message)}\n")
            sys.stderr.flush()


def warn(message: str) -> None:
    """Say what the user should know though the program goes on."""
    say(f"warning: {message}")


def _write(stream: TextIO, text: str) -> None:
    """Write text to a stream, escaping the characters that its encoding does not have."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _Output:
    """Standard output that may be full, of an encoding that lacks characters, or a pipe that no one reads any more.

    lasting: what cannot be written is dropped and the program goes on; `finish` raises what was in the way. Else
    that is raised at once.
    """

    def __init__(self, stream: TextIO | None, lasting: bool):
        # None: it was closed from the start, and nobody asked for lines.
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.lasting = lasting
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
            with suppress(OSError):  # what is still buffered would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            remedy = "all else was done" if self.lasting else "send it elsewhere"
            full = EnvironmentFault(f"standard output cannot be written: {error.strerror}; {remedy}")
            self._lost = self._lost or (error if isinstance(error, BrokenPipeError) else full)
            if not self.lasting:
                raise self._lost from error

    def finish(self) -> None:
        """Flush; raises what was in the way of any line."""
        self.flush()
        if self._lost is not None:
            raise self._lost

    def drop(self) -> None:
        """Flush what can be written, and raise nothing: the program ends for another reason."""
        self.lasting = True
        self.flush()


def exit_code_of(main: Callable[[], None], lasting: bool = False) -> int:
    """Run a program: 0, or the code of what ended it, said in one line on standard error.

    With --debug among the arguments the traceback comes first. lasting: a standard output that is full or closed
    does not end it, because its work is in files; the code is 1 all the same.
    """
    sys.stdout = output = _Output(sys.stdout, lasting)
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
        except SystemExit as ended:  # of --help, whose lines may be lost as well
            if ended.code:
                raise
        output.finish()
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted by SIGINT")
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    except BrokenPipeError:  # who read the output has seen enough
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explained(error)
        say(f"error: {message}" + ("" if debug or exit_code(error) is not None else "; --debug shows the traceback"))
        return code
    return 0


def leave(code: int) -> NoReturn:
    """End the process. After a signal at once, because threads that still extract features would hold it up."""
    if code > 128:
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
    return f"unforeseen {type(error).__name__} in {frame.filename}:{frame.lineno}: {one_line(error)}", 1
