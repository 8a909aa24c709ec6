"""Imports without garbage collection.

They make millions of objects that stay, and the collector would go through them again and again.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def pause_collection() -> None:
    """Stop collecting garbage, before the imports of a program."""
    gc.disable()


def resume_collection() -> None:
    """Collect garbage again if it was paused, but never look through what exists now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextmanager
def later_imports() -> Iterator[None]:
    """Pause the collector for imports during the work of a program."""
    collecting, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if len(sys.modules) > before:  # not at every call: freezing also keeps the garbage of that moment
                gc.freeze()
            gc.enable()
