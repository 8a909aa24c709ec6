"""ImageBank: batches of images, for a model that runs its ViT in the training loop."""

from collections.abc import Iterator

import torch
from torch import Tensor

from data.augment import AugmentConfig, View, apply_view, draw_view
from data.image_set import Splits
from features.placement import DeviceMemory, fetch_ahead

DEVICE_SHARE = 0.25  # share of a GPU's free memory for a split's images; the rest is for activations


class ImageBank:
    """Serves batches of (uint8 images, labels) of a split on a device, as FeatureBank serves features.

    A split's images stay on a GPU if they fit into a quarter of its free memory, else in host memory, from which
    batches are prefetched. The training split is augmented on the device, with a different view in each epoch, which
    depends only on the seed of the augmentation, the number of the view and the image. evaluation_batch: images per
    evaluation batch. memory: the GPU's memory, from `device` unless given.
    """

    def __init__(
        self,
        splits: Splits,
        augment: AugmentConfig,
        device: torch.device,
        evaluation_batch: int = 256,
        memory: DeviceMemory | None = None,
    ):
        self.splits, self.augment, self.device, self.evaluation_batch = splits, augment, device, evaluation_batch
        self.memory = memory or (DeviceMemory(device) if device.type == "cuda" else None)
        self._resident: dict[str, Tensor] = {}
        self._labels = {name: splits[name].labels_N.to(device) for name in ("train", "validation", "test")}

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one image, (3, H, W)."""
        return tuple(self.splits.train.images_NCHW.shape[1:])

    def require_room(self) -> None:
        """As that of a FeatureBank; images are stored already."""

    def batches(
        self, split: str, batch_size: int, order_N: Tensor | None = None, view: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 (B, 3, H, W), labels_B) on the device, in `order_N` (default: as stored).

        view: number of the augmented view; None: the original images.
        """
        total = len(self.splits[split])
        order_N = torch.arange(total) if order_N is None else order_N.cpu()
        if not len(order_N):
            return
        drawn = draw_view(total, self.augment, view) if view is not None and self.augment.active else None
        drawn, on_device = drawn and drawn.to(self.device), order_N.to(self.device).split(batch_size)
        images = self._fetch(split, order_N.split(batch_size), on_device)
        for images_BCHW, index_B in zip(images, on_device, strict=True):
            yield _augment(images_BCHW, drawn, index_B), self._labels[split].index_select(0, index_B)

    def _fetch(self, split: str, parts: tuple[Tensor, ...], on_device: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if self.memory is not None and not self._fits(split):
            return fetch_ahead(self.splits[split].images_NCHW, parts, self.memory)
        if split not in self._resident:
            self._resident[split] = self.splits[split].images_NCHW.to(self.device)
        return (self._resident[split].index_select(0, index_B) for index_B in on_device)

    def _fits(self, split: str) -> bool:
        size = self.splits[split].images_NCHW.nbytes
        return split in self._resident or size < self.memory.free() * DEVICE_SHARE


def _augment(images_BCHW: Tensor, drawn: View | None, index_B: Tensor) -> Tensor:
    return images_BCHW if drawn is None else apply_view(images_BCHW, drawn[index_B])
