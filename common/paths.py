"""Paths as users write them, and as they are stored."""

import os
from pathlib import Path


def expanded(text: str | os.PathLike) -> Path:
    """The path with ~ expanded, which a shell does not do in `--out=~/x`. The type of path options.

    Raises ValueError for an empty text or a null character.
    """
    text = os.fspath(text)
    if not text or "\0" in text:
        raise ValueError(
            f"{'a text with a null character' if text else 'an empty text'} is not a path: give a file or folder"
        )
    return Path(os.path.expanduser(text))


def cache_folder(name: str) -> Path:
    """The folder `name` in the cache, which keeps downloads and features between runs."""
    return Path(os.environ.get("VISION_MOE_CACHE", "~/.cache/vision_moe")) / name


def absolute(text: str | os.PathLike) -> Path:
    """The absolute path, which stays valid if the working folder changes."""
    return expanded(text).absolute()
