"""The environment of a measurement: versions, device, date."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn")


def environment(device: torch.device) -> dict[str, str]:
    """Name -> value, as text: date, device, Python and packages."""
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "device": device_name(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions(PACKAGES),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many of the CPU's cores PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
