"""FeatureBank: what the frozen backbone sees in each view of each split, computed once and reused."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from data.augment import AugmentConfig, View, apply_view, draw_view
from data.datasets import Splits

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class FeaturesConfig:
    """Features: when the frozen backbone runs."""

    mode: Literal["cached", "live"] = "cached"
    """cached: each view is extracted once and kept; live: the backbone runs again for every batch."""
    views: int = 8
    """How many augmented views of the training images the epochs cycle through (cached mode)."""
    batch_size: int = 256
    """Images that go through the backbone at once."""
    storage: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of stored features."""

    def __post_init__(self):
        for name in ("views", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"features.{name} is {getattr(self, name)}: it must be at least 1")


@contextmanager
def _batch_by_core(device: torch.device) -> Iterator[Callable]:
    """A `map` whose results come in order; on a CPU each core works on a batch of its own.

    The small matrix products of one batch do not keep several cores busy.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        yield map
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(cores)
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for the batches under way
        torch.set_num_threads(cores)


class FeatureBank:
    """Serves batches of (features, labels) of a split; the training split comes in augmented views.

    extract: turns uint8 images (B, 3, H, W) on `device` into features (B, ...) there, without gradients.
    In cached mode a view is extracted when it is first asked for and then kept, on the device while half of
    its free memory suffices, else in host memory. In live mode nothing is kept.
    """

    def __init__(
        self,
        splits: Splits,
        extract: Callable[[Tensor], Tensor],
        augment: AugmentConfig,
        config: FeaturesConfig,
        device: torch.device,
    ):
        self.splits, self.extract, self.augment, self.config = splits, extract, augment, config
        self.device = device
        self._stored: dict[tuple[str, int | None], Tensor] = {}
        self._labels = {name: splits[name].labels_N.to(device) for name in ("train", "validation", "test")}

    def batches(
        self, split: str, batch_size: int, order_N: Tensor | None = None, view: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features (B, ...) float, labels_B) on the device, in `order_N` (default: as stored).

        view: number of the augmented view, taken modulo features.views where views are kept; None: the
        images as they are.
        """
        total = len(self.splits[split])
        order_N = torch.arange(total) if order_N is None else order_N.cpu()
        view = self._resolve(view)
        stored = self._view(split, view) if self.config.mode == "cached" else None
        drawn = None if view is None or stored is not None else draw_view(total, self.augment, view)
        order_on_device = order_N.to(self.device)
        for start in range(0, len(order_N), batch_size):
            index_B = order_N[start : start + batch_size]
            index_on_device = order_on_device[start : start + batch_size]
            if stored is None:
                features = self._extract(split, index_B, drawn)
            elif stored.device == self.device:
                features = stored[index_on_device]
            else:
                features = stored[index_B].to(self.device)
            yield features, self._labels[split][index_on_device]

    def example(self) -> Tensor:
        """The features of the first training image (1, ...), for the model to take its input size from."""
        return self._extract("train", torch.tensor([0]), None)

    def _resolve(self, view: int | None) -> int | None:
        if view is None or not self.augment.active:
            return None
        return view % self.config.views if self.config.mode == "cached" else view

    def _extract(self, split: str, index_B: Tensor, drawn: View | None) -> Tensor:
        chunks = []
        for part in index_B.split(self.config.batch_size):
            images = self.splits[split].images_NCHW[part].to(self.device)
            chunks.append(self.extract(images if drawn is None else apply_view(images, drawn[part])))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _view(self, split: str, view: int | None) -> Tensor:
        """The stored features of a whole view of a split, extracted now if it is their first use."""
        key = (split, view)
        if key in self._stored:
            return self._stored[key]
        total, dtype = len(self.splits[split]), STORAGE[self.config.storage]
        drawn = None if view is None else draw_view(total, self.augment, view)
        label = f"features: {split}" + ("" if view is None else f", view {view + 1} of {self.config.views}")
        stored = None
        with tqdm(total=total, desc=label, unit="image", leave=False, disable=None) as bar:
            batches = torch.arange(total).split(self.config.batch_size)
            with _batch_by_core(self.device) as each:
                extracted = each(lambda index_B: self._extract(split, index_B, drawn).to(dtype), batches)
                for index_B, features in zip(batches, extracted, strict=True):
                    if stored is None:
                        stored = self._allocate((total, *features.shape[1:]), dtype)
                    stored[index_B[0] : index_B[-1] + 1] = features.to(stored.device)
                    bar.update(len(index_B))
        self._stored[key] = stored
        return stored

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cuda":
            needed = torch.Size(shape).numel() * dtype.itemsize
            if needed < torch.cuda.mem_get_info(self.device)[0] / 2:
                return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype)
