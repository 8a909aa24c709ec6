"""The size and place of features, printed and checked before they are extracted."""

from dataclasses import dataclass

import torch

from common.errors import EnvironmentFault
from common.memory import available_memory
from features.cache import FeatureCache
from features.file import gigabytes


@dataclass(frozen=True)
class Announcement:
    """The features of a split: bytes per view, number of views, and how many of them are not stored yet.

    later: bytes that the other splits will write. device, budget: a GPU and its bytes for features (None: no GPU).
    """

    split: str
    size: int
    views: int
    missing: int
    later: int = 0
    device: torch.device | None = None
    budget: int = 0

    def make(self, cache: FeatureCache | None) -> None:
        """Print one line. Raises EnvironmentFault if the disk of `cache`, or host memory, is too small."""
        what = f"features     {self.split}: {gigabytes(self.size * self.views)}"
        what += f" ({self.views} views of {gigabytes(self.size)})" if self.views > 1 else ""
        what += f", kept {self._where()}"
        if cache is None:
            print(what, flush=True)
            self._require_memory()
            return
        what += f"; {self.views - self.missing} of {self.views} in {cache.folder}"
        needed = self.size * self.missing
        if needed or self.later:
            what += f", {gigabytes(needed)} to write"
            what += f", and {gigabytes(self.later)} for other splits" if self.later else ""
            what += f" ({gigabytes(cache.free())} free)"
        print(what, flush=True)
        if needed + self.later:
            advice = "choose another --features.cache_dir, or null to keep them in memory only"
            advice += ", or lower --features.views" if self.missing > 1 else ""
            cache.require_space(needed + self.later, advice)

    @property
    def fitting(self) -> int:
        """Number of views that fit on the GPU."""
        return 0 if self.device is None else min(self.views, self.budget // max(1, self.size))

    def _where(self) -> str:
        if self.device is None:
            return "in host memory"
        if self.fitting == 0:
            return f"in host memory, prefetched ({gigabytes(self.budget)} of {self.device} may be used)"
        rest = ""
        if self.fitting < self.views:
            rest = f" for {self.fitting} of them, the others in host memory, prefetched"
        return f"on {self.device}{rest} ({gigabytes(self.budget)} of it may be used)"

    def _require_memory(self) -> None:
        needed, available = self.size * (self.views - self.fitting), available_memory()
        if available is not None and needed > available:
            lower = "lower --features.views, or " if self.views > 1 else ""
            raise EnvironmentFault(
                f"the features need {gigabytes(needed)} of host memory, but only {gigabytes(available)} are available: "
                f"{lower}store them on disk with --features.cache_dir DIR, or use --features.mode live"
            )
