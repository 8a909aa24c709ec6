"""Slow work at the start of a run: images, imports, the GPU, the compiler's processes."""

from functools import cache
from importlib import import_module

import torch

from assembly.replay import load_images
from common.ahead import Ahead
from common.imports import lazy_imports
from config.config import Config
from data.image_set import Splits


def read_images(config: Config) -> Splits:
    """The images of a run, with their fingerprints computed, for a separate thread. Raises as `load_images`."""
    splits = load_images(config)
    for name in ("train", "validation", "test"):
        splits[name].fingerprint()
    return splits


def get_ready(config: Config, device: torch.device, compiling: bool = True) -> None:
    """Do this work now, while a separate thread reads the images. compiling: whether blocks may be compiled later."""
    warm_up(device)
    with lazy_imports():
        if compiling and config.experts.place == "blocks" and compiles(config, device):
            import_module("torch._inductor.async_compile")  # starts its processes, which need seconds to be ready
        import_module("timm")


@cache
def warm_up(device: torch.device) -> None:
    """Start a GPU, which takes a second, in a separate thread; later calls do nothing."""
    if device.type == "cuda":
        Ahead(lambda: _start(device))


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled under train.compile."""
    return config.train.compile == "always" or (config.train.compile == "auto" and device.type == "cuda")


def _start(device: torch.device) -> None:
    """Create the GPU's context and load the library of matrix products; a failure shows up again at the first use."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(a, a)
    torch.cuda.synchronize(device)
