"""The format of a feature file: written atomically, checksums in its header, memory-mapped for reading."""

import json
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from common import errors
from common.locks import try_lock

# Part of every key: raise it when the file format or the computation of features changes.
FORMAT = 1
TENSOR = "features"
# Errors of reading a corrupt or foreign file; ValueError covers JSON and Unicode.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError)
CHUNK = 64 * 2**20  # bytes per checksum, so that several cores check a file
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # names of safetensors


class Draft:
    """A feature file under a temporary name: fill `tensor`, which maps the file, then call `finish`.

    dataset: a readable name, stored in the header with the key. `file` has a shared lock until it is finished or
    discarded, so that no process deletes it. Raises OSError if the disk is full: all space is allocated at once,
    because a mapped page without space would kill the process.
    """

    def __init__(self, path: Path, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, dataset: str = ""):
        self.path, self.key, self.dataset = path, key, dataset
        size = torch.Size(shape).numel() * dtype.itemsize
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        self._shape, self._dtype, self._size = shape, dtype, size
        header = self._header(["0" * 8] * (-(-size // CHUNK)))
        self.file = open(self.temporary, "wb+")  # noqa: SIM115, stays open for its lock
        with ExitStack() as unless_whole:  # an error or Ctrl-C: remove the incomplete file
            unless_whole.callback(self.discard)
            try_lock(self.file, shared=True)
            self.file.write(header)
            self.file.flush()
            _take_space(self.file.fileno(), len(header), size)
            whole = torch.from_file(str(self.temporary), shared=True, size=len(header) + size, dtype=torch.uint8)
            unless_whole.pop_all()
        self.tensor, self.start = whole[len(header) :].view(dtype).view(shape), len(header)

    def finish(self) -> bool:
        """Write the checksums, flush to disk, rename. Returns whether that worked; warns if not."""
        try:
            header = self._header(checksums(self.tensor).split())
            self.file.seek(0)
            self.file.write(header)
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)
            return True
        except (OSError, MemoryError, RuntimeError) as error:  # no disk space, memory or thread: training can continue
            say(f"{self.path} could not be stored ({reason(error)}): its features will be extracted again next time")
            return False
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file; the mapped tensor stays readable."""
        with suppress(OSError):
            self.temporary.unlink()
        with suppress(OSError):  # a full disk, already reported
            self.file.close()

    def _header(self, checksums: list[str]) -> bytes:
        """The safetensors header; its length does not depend on the checksums."""
        metadata = {"key": canonical(self.key), "crc32": " ".join(checksums), "dataset": self.dataset}
        tensor = {"dtype": NAMES[self._dtype], "shape": list(self._shape), "data_offsets": [0, self._size]}
        text = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
        text += b" " * (-(len(text) + 8) % 64)  # features begin at an aligned address
        return len(text).to_bytes(8, "little") + text


def mapped(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of another process's draft, to write to: the mapped file itself, from byte `start` on."""
    size = start + torch.Size(shape).numel() * dtype.itemsize
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[start:].view(dtype).view(shape)


def gigabytes(size: float) -> str:
    """A size in readable units: 12.3 GB, 45 MB, 3 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def canonical(key: dict[str, Any]) -> str:
    """A key as text, for the file's name and header."""
    return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The mapped tensor and the metadata. safetensors verifies that header and file size agree."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(TENSOR), file.metadata() or {}


def checksums(features: Tensor) -> str:
    """CRC-32 of every 64 MiB, on several cores, to detect truncated or altered files."""
    if not features.numel():
        return ""
    view = memoryview(features.reshape(-1).view(torch.uint8).numpy())
    parts = [view[start : start + CHUNK] for start in range(0, len(view), CHUNK)]
    with ThreadPoolExecutor(min(16, len(parts), os.cpu_count() or 1)) as pool:
        return " ".join(f"{value:08x}" for value in pool.map(zlib.crc32, parts))


def _take_space(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, start + size)
    else:  # macOS and Windows: a sparse file, whose space was only checked
        os.truncate(descriptor, start + size)


def reason(error: Exception) -> str:
    """The reason of an error in a few words."""
    return getattr(error, "strerror", None) or errors.one_line(error, 160)


def say(message: str) -> None:
    """Print one line about stored features to standard error."""
    errors.say(f"features: {message}")
