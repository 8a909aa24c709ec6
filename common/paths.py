"""Paths as users write them, and as they are stored."""

import os
from pathlib import Path


def expanded(text: str | os.PathLike) -> Path:
    """The path with its ~ replaced by the home folder, which a shell leaves in `--out=~/x`. The type of path options.

    Raises ValueError for what no file can be called.
    """
    text = os.fspath(text)
    if not text or "\0" in text:
        raise ValueError(f"{'a null character is' if text else 'an empty text is'} no path: name a file or folder")
    return Path(os.path.expanduser(text))


def cache_folder(name: str) -> Path:
    """The folder `name` in which downloads and features outlive a run."""
    return Path(os.environ.get("VISION_MOE_CACHE", "~/.cache/vision_moe")) / name


def absolute(text: str | os.PathLike) -> Path:
    """The path as it is stored, so that it holds in another working folder as well."""
    return expanded(text).absolute()
