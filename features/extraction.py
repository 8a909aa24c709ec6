"""Feature extraction: prepare uint8 images and run the frozen backbone, compiled if that saves time."""

import sys
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import one_line, warn
from features.bank import FeatureBank
from features.images import ImageBank
from model.backbone import Backbone
from model.preparation import preparation, resize_and_normalise

# Measured by benchmarks/extraction.py on an H200: the number of images above which compiling (14 to 22 s) pays off at
# 10 microseconds per image, and the mode of torch.compile: max-autotune compiles three times as long and gains one per
# cent.
COMPILE_FROM = 2_000_000
COMPILE_MODE = "default"
HOURS = 5e14  # FLOPs that take hours on one core


def worth_compiling(choice: str, images: int, device: torch.device) -> bool:
    """Whether to compile the backbone for this many images, by features.compile (auto, always, never)."""
    return choice == "always" or (choice == "auto" and device.type == "cuda" and images >= COMPILE_FROM)


def warn_of_hours(bank: FeatureBank | ImageBank, flops: int, epochs: int) -> None:
    """Warn if the frozen backbone will take hours on a CPU. flops: of one image."""
    if bank.device.type != "cpu":
        return
    splits, trains = bank.splits, isinstance(bank, ImageBank)
    live = trains or bank.config.mode == "live"
    # With experts inside, each image needs a forward and a backward pass.
    each_epoch = (1 + trains) * len(splits.train) + len(splits.validation)
    images = epochs * each_epoch + len(splits.test) if live else bank.images_left()
    if flops * images > HOURS * torch.get_num_threads():
        less = ", or --features.mode cached" if live else ", or fewer --features.views" if bank.views_used > 1 else ""
        less = ", or --experts.place head" if trains else less
        warn(
            f"{images:,} images, each view counted, need the backbone on a CPU, which takes hours: use a GPU, "
            f"or --backbone.name bundled/vit_micro (for CIFAR-100 --config configs/cifar100_cpu.yaml){less}"
        )


class Extractor:
    """uint8 images (B, 3, H, W) -> the backbone's features (B, ...), on the images' device.

    compiled: compile the backbone for batches of `batch_size` images at the first of them; other batches, such as the
    last one of a split, run eagerly. If compiling fails, a line says so and all batches run eagerly; `failed` has the
    reason.
    """

    def __init__(self, backbone: Backbone, batch_size: int, compiled: bool = False, mode: str = COMPILE_MODE):
        self.backbone, self.batch_size, self.mode = backbone, batch_size, mode
        self._run: Callable[..., Tensor] | None = None if compiled else self._eager
        self.failed = ""
        self._compiling = threading.Lock()  # several threads may call it

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        backbone = self.backbone
        sides = (*images_BCHW.shape[-2:], backbone.image_size)
        constants = preparation(sides, backbone.mean, backbone.std, images_BCHW.device)
        if len(images_BCHW) != self.batch_size:
            return self._eager(images_BCHW, constants)
        if self._run is None:
            with self._compiling:
                self._run = self._run or self._compile(images_BCHW, constants)
        return self._run(images_BCHW, constants)

    def _eager(self, images_BCHW: Tensor, constants: tuple[Tensor | None, ...]) -> Tensor:
        return self.backbone(resize_and_normalise(images_BCHW, constants))

    def _compile(self, *batch) -> Callable[..., Tensor]:
        self.backbone.runner(batch[0].device)  # created outside the traced code
        try:
            run = torch.compile(self._eager, mode=self.mode, dynamic=False)
            with (
                warnings.catch_warnings()
            ):  # resizing stays exact, without the TensorFloat32 that the compiler recommends
                warnings.filterwarnings("ignore", "TensorFloat32")
                run(*batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler raises all kinds of errors
            self.failed = one_line(error, 160)
            print(
                f"features: the backbone cannot be compiled ({self.failed}): continuing without compiling",
                file=sys.stderr,
            )
            return self._eager
        return run
