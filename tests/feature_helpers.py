"""A small bank of features on a fake device, and files of stored features."""

import torch

from config.features import FeaturesConfig
from data.augment import AugmentConfig
from data.image_set import ImageSet, Splits
from features.bank import FeatureBank
from features.cache import FeatureCache

CPU = torch.device("cpu")


KEY = {"split": "train", "view": 1, "data": "d" * 64, "weights": "w" * 64, "storage": "float16"}


SOURCE = {"backbone": "a backbone", "weights": "w" * 64, "precision": "torch.float32"}


def images(count, offset=0):
    values = torch.arange(offset, offset + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return ImageSet(values.contiguous(), torch.arange(count) % 2, ("even", "odd"))


SPLITS = Splits(images(40), images(10, 100), images(12, 200))


class Memory:
    """Replaces a GPU's memory on a machine without a GPU."""

    pinned = False

    def __init__(self, free=10**9, allocations=None):
        self.bytes_free, self.allocations, self.uploads, self.released = free, allocations, 0, 0

    def free(self):
        return self.bytes_free

    def empty(self, shape, dtype):
        if self.allocations is not None:
            if self.allocations == 0:
                raise torch.OutOfMemoryError("the device is full")
            self.allocations -= 1
        return torch.empty(shape, dtype=dtype)

    def release(self):
        self.released += 1

    def upload(self, host):
        self.uploads += 1
        return host.clone(), Event()

    def ready(self, copy, event):
        event.synchronize()
        return copy


class Event:
    def synchronize(self):
        pass


def bank(cache=None, memory=None, calls=None, source=SOURCE, augment=True, views=2, fail=(), **options):
    """A bank whose features are the pixels; `calls` collects batch sizes, `fail` the calls that run out of memory."""
    calls, seen = [] if calls is None else calls, [0]

    def extract(batch):
        if len(batch) > 1:
            seen[0] += 1
            if seen[0] in fail:
                raise torch.OutOfMemoryError("the device is full")
            calls.append(len(batch))
        return batch.float().flatten(1)

    augment = AugmentConfig(flip=augment, crop=1 if augment else 0)
    config = FeaturesConfig(views=views, batch_size=16, **options)
    return FeatureBank(SPLITS, extract, augment, config, CPU, cache, source, memory=memory)


def everything(features, split="train", view=0, batch=7):
    order = torch.randperm(len(SPLITS[split]), generator=torch.Generator().manual_seed(3))
    parts = list(features.batches(split, batch, order, view))
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


def stored_file(folder, value=1.5, key=KEY, shape=(5, 3)):
    cache = FeatureCache(folder)
    draft = cache.draft(key, shape, torch.float16)
    draft.tensor.fill_(value)
    cache.commit(draft)
    cache.wait()
    return cache, cache.path(key)
