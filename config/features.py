"""FeaturesConfig: when the frozen backbone runs, and where its features are stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.paths import absolute, cache_folder

MOST = 10**9
DEFAULT_FOLDER = cache_folder("features")


@dataclass
class FeaturesConfig:
    """Features: when the frozen backbone runs, and where its features are stored."""

    mode: Literal["cached", "live"] = "cached"
    """cached: extract each view once and store it; live: run the backbone for every batch."""
    views: int = 8
    """Number of augmented views of the training images that the epochs cycle through (cached mode)."""
    batch_size: int = 256
    """Images in one forward pass of the backbone."""
    storage: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of stored features."""
    cache_dir: Path | None = DEFAULT_FOLDER
    """Folder that keeps features for later runs (cached mode); null: keep them in memory only."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the backbone; auto: on a GPU, if there are enough images for it to pay off."""

    def __post_init__(self):
        self.cache_dir = None if self.cache_dir is None else absolute(self.cache_dir)
        for name in ("views", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"features.{name} is {getattr(self, name)}: it must be between 1 and {MOST:,}")
