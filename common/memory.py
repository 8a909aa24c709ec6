"""How much memory this machine has, how much of it can be taken, and how much this process took."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


def installed_memory() -> int | None:
    """Bytes of host memory; None where it cannot be told."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)


def size_in_bytes(text: str) -> int:
    """The bytes of a size as people write it: 512MB, 1.5GB, 200MiB, 0. Raises ValueError."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no size: write it as 512MB, 1.5GB or 0")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has had allocated at once, of a GPU's memory or of the host's.

    None where it cannot be told.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # there is no such module on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can be taken without swapping, as Linux estimates them; elsewhere all there are.

    At most what a container (control groups, version 2) has left. None where it cannot be told.
    """
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not found and (installed := installed_memory()) is not None:
        found.append(installed)
    with suppress(OSError, ValueError, KeyError):  # there, and a number, where a limit is set
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        found.append(max(0, limit - used + int(parts["inactive_file"])))  # of files, which can be dropped
    return min(found, default=None)
