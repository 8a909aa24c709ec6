"""What a figure was made with: versions, device, date."""

import os
import platform
from datetime import datetime
from importlib import metadata

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn")


def environment(device: torch.device) -> dict[str, str]:
    """Name -> value, as text: date, device, Python and packages."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "device": name,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }
