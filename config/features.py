"""FeaturesConfig: when the frozen backbone runs, and where what it sees is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.paths import absolute, cache_folder

MOST = 10**9
DEFAULT_FOLDER = cache_folder("features")


@dataclass
class FeaturesConfig:
    """Features: when the frozen backbone runs, and where what it sees is kept."""

    mode: Literal["cached", "live"] = "cached"
    """cached: each view is extracted once and kept; live: the backbone runs again for every batch."""
    views: int = 8
    """How many augmented views of the training images the epochs cycle through (cached mode)."""
    batch_size: int = 256
    """Images that go through the backbone at once."""
    storage: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of stored features."""
    cache_dir: Path | None = DEFAULT_FOLDER
    """Folder in which features outlive the run (cached mode); null: they are kept in memory only."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the backbone; auto: on a GPU, where there are images enough to repay it."""

    def __post_init__(self):
        self.cache_dir = None if self.cache_dir is None else absolute(self.cache_dir)
        for name in ("views", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"features.{name} is {getattr(self, name)}: it must be from 1 to {MOST:,}")
