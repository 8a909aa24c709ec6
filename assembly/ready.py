"""Slow start-up work that needs no images: imports, the GPU, the compiler's processes."""

from importlib import import_module

import torch

from common.ahead import Ahead
from config.config import Config


def get_ready(config: Config, device: torch.device, training: bool) -> None:
    """Do this work now, while a separate thread reads the images.

    training: whether an optimizer follows, for which PyTorch imports its compiler.
    """
    if device.type == "cuda":
        Ahead(lambda: _start(device))
    if config.experts.place == "blocks" and compiles(config, device):
        import_module("torch._inductor.async_compile")  # starts its processes, which need seconds to be ready
    elif training:
        import_module("torch._dynamo")
    import_module("timm")


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled under train.compile."""
    return config.train.compile == "always" or (config.train.compile == "auto" and device.type == "cuda")


def _start(device: torch.device) -> None:
    """Create the GPU's context and load the library of matrix products; a failure shows up again at the first use."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(a, a)
    torch.cuda.synchronize(device)
