"""How files are written, so that none is ever half there."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import EnvironmentFault, one_line
from common.text import as_json


def write_atomically(path: Path, write: Callable[[Path], Any], kept: str = "", previous: Path | None = None) -> None:
    """Call write(temporary path), flush it to the disk, and only then give it its name.

    The folder is made where its parent exists: a run folder that was removed does not come back with one file in it.
    kept: what remains where this fails, for the message. previous: the name that the file it replaces gets.
    Raises EnvironmentFault.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors shuts out everyone else
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _set_aside(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors raise their own on a full disk
        kept = kept or (f"{path} as it was" if path.exists() else "none yet")
        raise EnvironmentFault(
            f"{path} could not be written: {_reason(error)}; kept: {kept}; free the disk or fix the path"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _reason(error: BaseException) -> str:
    """What the system said first: PyTorch's own complaint about a file that ended early comes on top of it."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    return one_line(error, 160)


def _set_aside(path: Path, previous: Path) -> None:
    """Keep a file under a second name, so that there is no moment without the first."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a disk without hard links
        os.replace(path, previous)


def _flush_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can."""
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
    """Write text as UTF-8, atomically; bytes of a file name that are no text are escaped."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
