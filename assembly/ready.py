"""What takes seconds at the start of a run, and needs no images: imports, the GPU, the compiler's processes."""

from importlib import import_module

import torch

from common.ahead import Ahead
from config.config import Config


def get_ready(config: Config, device: torch.device, training: bool) -> None:
    """Do that now, while images are read in a thread of their own.

    training: whether an optimizer follows, for which PyTorch imports its compiler.
    """
    if device.type == "cuda":
        Ahead(lambda: _start(device))
    if config.experts.place == "blocks" and compiles(config, device):
        import_module("torch._inductor.async_compile")  # starts its processes, which take seconds to be ready
    elif training:
        import_module("torch._dynamo")
    import_module("timm")


def compiles(config: Config, device: torch.device) -> bool:
    """Whether train.compile asks for compiled blocks."""
    return config.train.compile == "always" or (config.train.compile == "auto" and device.type == "cuda")


def _start(device: torch.device) -> None:
    """Create the GPU's context and load the library of matrix products; what fails fails again where it is used."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(a, a)
    torch.cuda.synchronize(device)
