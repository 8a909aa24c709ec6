"""Imports without garbage collection.

They create millions of permanent objects, which the collector would scan repeatedly.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def pause_collection() -> None:
    """Stop collecting garbage, before the imports of a program."""
    gc.disable()


def resume_collection() -> None:
    """Collect garbage again if it was paused; objects that exist now are never scanned."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextmanager
def lazy_imports() -> Iterator[None]:
    """Pause the collector for imports inside functions."""
    collecting, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if len(sys.modules) > before:  # not every time, because freezing also keeps present garbage
                gc.freeze()
            gc.enable()
