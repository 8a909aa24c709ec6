"""Plug-ins: a user's Python code that registers routing rules, experts, losses, datasets or figures.

They are code, so only the command line can load them, never a file, a checkpoint or a server.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from common.errors import CommandError, UserError, exit_code, one_line
from common.text import printable, quoted

GROUP = "vision_moe.plugins"
"""Entry points of installed packages that --plugins can name."""

HELP = (
    "A Python file that registers a routing rule, an expert, a loss, a dataset or a figure, or the name of an "
    f"installed package's entry point in {GROUP}; may be given more than once."
)

_loaded: dict[str, str] = {}  # name of each plug-in -> where it comes from


def loaded_plugins() -> list[str]:
    """Names of the loaded plug-ins, in order: their file names or entry points."""
    return list(_loaded)


def load_plugins(named: Iterable[str]) -> None:
    """Load plug-ins from files or entry points, each once.

    Raises UserError for a plug-in that does not exist, cannot be loaded, or has the same name as another.
    """
    for text in named:
        path = Path(os.path.expanduser(text))
        if path.suffix == ".py":
            _load(path.name, str(path.resolve()), text, partial(_run_file, path.resolve()))
            continue
        point = next((point for point in entry_points(group=GROUP) if point.name == text), None)
        if point is None:
            raise UserError(
                f"--plugins {quoted(text)} is neither a Python file nor an entry point in {GROUP}: name a file that "
                "ends in .py, or an installed plug-in"
            )
        _load(text, point.value, text, point.load)


def require_plugins(names: Sequence[str], place: str) -> None:
    """Raise CommandError for a plug-in that is not loaded. place: where it is named, for the message."""
    for name in names:
        if name not in _loaded:
            path = f"PATH/{name}" if name.endswith(".py") else name
            raise CommandError(
                f"{printable(place)} needs the plug-in {one_line(printable(name), 80)}, and only the command line "
                f"can load plug-ins: add --plugins {one_line(quoted(path), 80)}"
            )


def _load(name: str, source: str, text: str, run: Callable[[], Any]) -> None:
    if _loaded.get(name) == source:
        return
    if name in _loaded:
        raise UserError(f"--plugins {quoted(text)} has the same name as {printable(_loaded[name])}: rename one of them")
    try:
        run()
    except (Exception, SystemExit) as error:
        named = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        reason = named if exit_code(error) is None else str(error)
        raise UserError(
            f"--plugins {quoted(text)} cannot be loaded{_line(error, source)}: {one_line(reason)}"
        ) from error
    _loaded[name] = source


def _line(error: BaseException, source: str) -> str:
    """The line of the plug-in in which an error was raised, in words."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    if isinstance(error, SyntaxError) and error.filename == source:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _run_file(source: Path) -> None:
    """Import a file that need not be on the module search path."""
    if not source.is_file():
        raise UserError("there is no such file")
    name = f"plugin_{source.stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up a class's module here
    try:
        spec.loader.exec_module(module)
    except BaseException:  # Ctrl-C too: a partly imported module must not stay
        del sys.modules[name]
        raise
