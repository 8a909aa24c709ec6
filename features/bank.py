"""FeatureBank: the frozen backbone's features of each view of each split, computed once and reused."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.distributed import world
from common.meter import meter
from config.features import FeaturesConfig
from data.augment import AugmentConfig, View, apply_view, draw_view
from data.image_set import Splits
from features.announcement import Announcement
from features.cache import FeatureCache
from features.placement import DeviceMemory, HostCopy, Stored, fetch_ahead
from features.together import bring_together, own_batches, shared_file

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE_SHARE = 0.5  # share of a GPU's free memory for features; the rest is for the model and its optimizer
IMAGE_SHARE = 1 / 16  # share of it for a split's images while a view is extracted


@contextmanager
def _batch_by_core(device: torch.device) -> Iterator[Callable]:
    """A `map` with ordered results; on a CPU each core processes its own batch.

    The small matrix products of one batch do not use several cores well.
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
        pool.shutdown(wait=False, cancel_futures=True)  # otherwise Ctrl-C would wait for running batches
        torch.set_num_threads(cores)


class FeatureBank:
    """Serves batches of (features, labels) of a split; the training split comes in augmented views.

    extract: turns uint8 images (B, 3, H, W) on `device` into features (B, ...) there, without gradients.
    In cached mode a view is extracted at its first use and then stored: on a GPU if it fits into half of its free
    memory, else in host memory, from which batches are prefetched; with `cache` also on disk, under a key of the view,
    the data and `source` (everything else that determines the features, as plain values). In live mode nothing
    is stored. views_used: views that the run will use (None: all), for the printed size. memory: the GPU's
    memory, from `device` unless given.

    Raises EnvironmentFault if the disk of `cache` (or, without a cache, host memory) is too small.
    """

    evaluation_batch = 1024  # samples per evaluation batch

    def __init__(
        self,
        splits: Splits,
        extract: Callable[[Tensor], Tensor],
        augment: AugmentConfig,
        config: FeaturesConfig,
        device: torch.device,
        cache: FeatureCache | None = None,
        source: dict[str, Any] | None = None,
        views_used: int | None = None,
        memory: DeviceMemory | None = None,
    ):
        self.splits, self.extract, self.augment, self.config = splits, extract, augment, config
        self.device, self.cache, self.source = device, cache, source or {}
        self.views_used = min(config.views, views_used or config.views)
        self.memory = memory or (DeviceMemory(device) if device.type == "cuda" else None)
        self._budget = int(self.memory.free() * DEVICE_SHARE) if self.memory else 0
        self._dtype = STORAGE[config.storage]
        self._stored: dict[tuple[str, int | None], Stored] = {}
        self._announced: set[str] = set()
        self._data: dict[str, str] = {}
        self._labels = {name: splits[name].labels_N.to(device) for name in ("train", "validation", "test")}

    def batches(
        self, split: str, batch_size: int, order_N: Tensor | None = None, view: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features (B, ...) float, labels_B) on the device, in `order_N` (default: as stored).

        view: number of the augmented view, modulo features.views in cached mode; None: the original images.
        """
        total = len(self.splits[split])
        order_N = torch.arange(total) if order_N is None else order_N.cpu()
        if not len(order_N):
            return
        parts, labels = order_N.split(batch_size), self._labels[split]
        on_device = order_N.to(self.device).split(batch_size)
        view = self._resolve(view)
        if self.config.mode == "live":
            drawn = None if view is None else draw_view(total, self.augment, view)
            images = self.splits[split].images_NCHW
            features = (self._extract(images, index_B, drawn) for index_B in parts)
        else:
            features = self._fetch(self._view(split, view), parts, on_device)
        for features_B, index_B in zip(features, on_device, strict=True):
            yield features_B, labels.index_select(0, index_B)

    @cached_property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one sample's features, from the first training image."""
        return tuple(self._extract(self.splits.train.images_NCHW, torch.tensor([0]), None).shape[1:])

    def require_room(self) -> None:
        """Print the size and place of the training features before their first use.

        Raises EnvironmentFault if the disk, or host memory, is too small for them.
        """
        if self.config.mode == "cached":
            self._announce("train", self._resolve(0))

    def images_left(self) -> int:
        """Forward passes of the backbone, in images, until all features of the run are stored; each view counts."""
        drawn = range(self.views_used) if self.augment.active else [None]
        views = {"train": drawn, "validation": [None], "test": [None]}
        left = {name: len(of) if self.cache is None else self._missing(name, of) for name, of in views.items()}
        return sum(len(self.splits[name]) * count for name, count in left.items())

    def _resolve(self, view: int | None) -> int | None:
        if view is None or not self.augment.active:
            return None
        return view % self.config.views if self.config.mode == "cached" else view

    def _fetch(self, stored: Stored, parts: tuple[Tensor, ...], on_device: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if stored.device is None and self.memory is not None:
            return fetch_ahead(stored.host, parts, self.memory)
        source = stored.host if stored.device is None else stored.device
        return (source.index_select(0, index_B) for index_B in on_device)

    def _extract(self, images_NCHW: Tensor, index_B: Tensor, drawn: View | None) -> Tensor:
        chunks = []
        for part in index_B.split(self.config.batch_size):
            images = images_NCHW[part].to(self.device)
            chunks.append(self.extract(images if drawn is None else apply_view(images, drawn[part])))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _view(self, split: str, view: int | None) -> Stored:
        """The stored features of a view of a split, read or extracted at their first use."""
        name = (split, view)
        if name not in self._stored:
            self._announce(split, view)
            found = self.cache.load(self._key(split, view)) if self.cache else None
            found = found if world().all(found is not None) else None
            self._stored[name] = self._extract_view(split, view) if found is None else self._place(found)
        return self._stored[name]

    def _key(self, split: str, view: int | None) -> dict[str, Any]:
        """Everything that determines the features of a view."""
        if split not in self._data:
            self._data[split] = self.splits[split].fingerprint()
        augment = None if view is None else asdict(self.augment)
        key = {"split": split, "view": view, "data": self._data[split], "augment": augment}
        return {**key, "storage": self.config.storage, **self.source}

    def _announce(self, split: str, view: int | None) -> None:
        """Print once the size and place of a split's features; the disk must have room for all splits."""
        if split in self._announced:
            return
        self._announced.add(split)
        views = [None] if view is None else range(self.views_used)
        others = () if split != "train" else {"validation", "test"} - self._announced
        later = sum(self._size(other) * self._missing(other, [None]) for other in others)
        missing, device = self._missing(split, views), self.device if self.memory else None
        line = Announcement(split, self._size(split), len(views), missing, later, device, self._budget)
        line.make(self.cache)

    def _size(self, split: str) -> int:
        """Bytes of a view."""
        return len(self.splits[split]) * math.prod(self.feature_shape) * self._dtype.itemsize

    def _missing(self, split: str, views: Iterable[int | None]) -> int:
        """Number of views that are not in the cache yet."""
        return 0 if self.cache is None else sum(not self.cache.has(self._key(split, view)) for view in views)

    def _extract_view(self, split: str, view: int | None) -> Stored:
        total, images = len(self.splits[split]), self.splits[split].images_NCHW
        drawn = None if view is None else draw_view(total, self.augment, view)
        if self.memory is not None and images.nbytes < self.memory.free() * IMAGE_SHARE:
            images = images.to(self.device)
            drawn = drawn and drawn.to(self.device)
        stored, host_copy = self._allocate(split, view), HostCopy()

        def extract(index_B: Tensor) -> Tensor:
            try:
                return self._extract(images, index_B, drawn).to(self._dtype)
            except torch.OutOfMemoryError:
                host_copy.finish()
                if world().several or not self._make_room(stored):  # a single process cannot decide for the others
                    raise
            return self._extract(images, index_B, drawn).to(self._dtype)

        label = f"features: {split}" + ("" if view is None else f", view {view + 1} of {self.config.views}")
        with ExitStack() as unless_whole:  # an error or Ctrl-C: remove the incomplete view
            if stored.draft is not None:
                unless_whole.callback(stored.draft.discard)
            batches = torch.arange(total, device=images.device).split(self.config.batch_size)
            own, start = own_batches(batches), world().part(len(batches)).start * self.config.batch_size
            with meter(label, sum(map(len, own))) as done, _batch_by_core(self.device) as each:
                for features in each(extract, own):
                    stored.put(start, features, host_copy)
                    start += len(features)
                    done(len(features))
            host_copy.finish()
            if world().several:
                self._bring_together(stored)
            unless_whole.pop_all()
        return self._settle(stored)

    def _bring_together(self, stored: Stored) -> None:
        """Make the features extracted by all processes available in each of them."""
        if stored.device is not None:
            bring_together(stored.device, self.config.batch_size)
        elif not stored.shared:
            bring_together(stored.host, self.config.batch_size)
        world().wait()  # until the file, if any, is complete

    def _allocate(self, split: str, view: int | None) -> Stored:
        shape = (len(self.splits[split]), *self.feature_shape)
        stored = Stored(device=self._take(shape))
        if self.cache is not None and world().first:
            stored.draft = self.cache.draft(self._key(split, view), shape, self._dtype)
        if self.cache is not None:
            stored.host = shared_file(stored.draft, shape, self._dtype)
            stored.shared = stored.host is not None
            stored.draft = stored.draft if stored.shared else None
        if stored.host is None and stored.device is None:
            stored.host = torch.empty(shape, dtype=self._dtype)
        return stored

    def _settle(self, stored: Stored) -> Stored:
        """Finish a view: commit its file, and keep no second copy of it in host memory."""
        if stored.draft is not None:
            self.cache.commit(stored.draft)
            stored.draft = None
        if stored.device is not None:
            stored.host = None
        return stored

    def _place(self, mapped: Tensor) -> Stored:
        """Place a view that was read from disk: on the device if it fits, else as the mapped file."""
        device = self._take(tuple(mapped.shape))
        if device is None:
            return Stored(host=mapped)
        device.copy_(mapped)
        return Stored(device=device)

    def _take(self, shape: tuple[int, ...]) -> Tensor | None:
        """Device memory for a view, or None if it does not fit."""
        size = torch.Size(shape).numel() * self._dtype.itemsize
        fits = self.memory is not None and size <= self._budget and size <= self.memory.free()
        if not world().all(fits):
            return None
        try:
            taken = self.memory.empty(shape, self._dtype)
        except torch.OutOfMemoryError:
            if world().several:
                raise
            self._fall_back()
            return None
        self._budget -= size
        return taken

    def _make_room(self, current: Stored) -> bool:
        """Move the current view, or else the last stored one, to host memory; False if there is none."""
        on_device = [stored for stored in (*self._stored.values(), current) if stored.device is not None]
        if not on_device:
            return False
        moved = on_device[-1]
        if moved.host is None:
            moved.host = moved.device.cpu()
        moved.device = None
        self._fall_back()
        return True

    def _fall_back(self) -> None:
        self._budget = 0
        self.memory.release()
        print(f"features     {self.device} is out of memory: the rest goes to host memory", flush=True)
