"""Atomic writing of files."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import EnvironmentFault, one_line
from common.text import as_json


def write_atomically(path: Path, write: Callable[[Path], Any], kept: str = "", previous: Path | None = None) -> None:
    """Call write(temporary path), flush the file to disk, then rename it to `path`.

    The folder is created only if its parent exists, so that a removed run folder is not recreated for one file.
    kept: what remains after a failure, for the message. previous: where to keep the file that is replaced.
    Raises EnvironmentFault.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors creates files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _set_aside(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # PyTorch and safetensors raise their own errors on a full disk
        kept = kept or (f"{path}, unchanged" if path.exists() else "none yet")
        raise EnvironmentFault(
            f"{path} could not be written: {_reason(error)}; kept: {kept}; free the disk or fix the path"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def require_place(path: Path, option: str) -> None:
    """Raise EnvironmentFault if this path could not be written; leaves nothing behind.

    option: the option that names the path, for the message.
    """
    parent = next(each for each in path.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=parent):
            pass
    except OSError as error:
        raise EnvironmentFault(
            f"{option} {path} cannot be created in {parent}: {error.strerror}; choose another folder"
        ) from error


def _reason(error: BaseException) -> str:
    """The first operating-system error: PyTorch raises another one on top of it."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    return one_line(error, 160)


def _set_aside(path: Path, previous: Path) -> None:
    """Keep a file under a second name, without removing the first."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power failure, if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_text(path, as_json(value) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically; bytes of file names that are not valid text are escaped."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
