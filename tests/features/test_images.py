"""The bank of images: its output does not depend on batches, and images that do not fit are prefetched."""

import pytest
import torch

from data.augment import AugmentConfig, apply_view, draw_view
from data.image_set import ImageSet, Splits
from features.images import ImageBank

CPU = torch.device("cpu")
STRONG = AugmentConfig(flip=True, crop=1, scale=0.6, color_jitter=0.2, strong=0.5)


def image_set(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images_NCHW = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageSet(images_NCHW, torch.arange(count) % 3, ("a", "b", "c"))


@pytest.fixture
def splits() -> Splits:
    return Splits(image_set(20, 0), image_set(7, 1), image_set(9, 2))


class HostMemory:
    """A full device, whose copies are made on the host."""

    pinned = False
    uploads = 0

    def free(self) -> int:
        return 100

    def upload(self, host):
        self.uploads += 1
        return host.clone(), None

    def ready(self, copy, event):
        return copy


def test_it_returns_the_images_and_labels_of_a_split(splits):
    batches = list(ImageBank(splits, STRONG, CPU).batches("validation", 3))
    assert [len(labels_B) for _, labels_B in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), splits.validation.images_NCHW)
    assert torch.equal(torch.cat([labels for _, labels in batches]), splits.validation.labels_N)


def test_an_image_of_a_view_is_the_same_in_any_batch_and_order(splits):
    bank, order_N = ImageBank(splits, STRONG, CPU), torch.randperm(20)
    expected = apply_view(splits.train.images_NCHW, draw_view(20, STRONG, 5))
    assert not torch.equal(expected, splits.train.images_NCHW)
    for size in (4, 20):
        parts = list(bank.batches("train", size, order_N, view=5))
        assert torch.equal(torch.cat([images for images, _ in parts]), expected[order_N])
        assert torch.equal(torch.cat([labels for _, labels in parts]), splits.train.labels_N[order_N])
    other = next(iter(bank.batches("train", 20, view=6)))[0]
    assert not torch.equal(other, expected)


def test_images_that_do_not_fit_are_prefetched_from_host_memory(splits):
    memory, order_N = HostMemory(), torch.randperm(20)
    fetched = list(ImageBank(splits, STRONG, CPU, memory=memory).batches("train", 6, order_N, view=1))
    resident = list(ImageBank(splits, STRONG, CPU).batches("train", 6, order_N, view=1))
    assert memory.uploads == len(fetched) == 4
    for (images, labels_B), (expected, expected_B) in zip(fetched, resident, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels_B, expected_B)


def test_without_augmentation_images_are_unchanged(splits):
    bank = ImageBank(splits, AugmentConfig(flip=False, crop=0), CPU)
    images, _ = next(bank.batches("train", 20, view=3))
    assert torch.equal(images, splits.train.images_NCHW)
    assert bank.feature_shape == (3, 6, 6)
    assert list(bank.batches("train", 20, torch.tensor([], dtype=torch.int64))) == []
