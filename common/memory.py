"""Installed, available and peak memory."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


def installed_memory() -> int | None:
    """Bytes of host memory; None if unknown."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)


def size_in_bytes(text: str) -> int:
    """The number of bytes of a size such as 512MB, 1.5GB, 200MiB or 0. Raises ValueError."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is not a size: write it as 512MB, 1.5GB or 0")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes, on a GPU or on the host.

    None if unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # there is no such module on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory available without swapping, as Linux estimates them; on other systems the installed memory.

    At most what a container (control groups, version 2) has left. None if unknown.
    """
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not found and (installed := installed_memory()) is not None:
        found.append(installed)
    with suppress(OSError, ValueError, KeyError):  # they hold a number only if a limit is set
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        found.append(max(0, limit - used + int(parts["inactive_file"])))  # page cache, which the system can drop
    return min(found, default=None)
