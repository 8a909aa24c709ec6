"""Feature files on disk: written whole or not at all, checked when read, memory-mapped, never run as code.

python -m data.feature_cache list [--dir DIR]     what is stored, for which backbone and data
python -m data.feature_cache clear [--dir DIR]    delete it
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from errors import EnvironmentFault, UserError, exit_code_of

# Part of every key: raise it when the file format changes, or the arithmetic between images and stored features.
FORMAT = 1
DEFAULT_FOLDER = Path(os.environ.get("VISION_MOE_CACHE", "~/.cache/vision_moe")) / "features"
TENSOR = "features"
# What reading a torn or foreign file raises; ValueError covers JSON and Unicode.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError)
OWN_NAME = re.compile(r"\.?\w+-(plain|view\d+)-[0-9a-f]{24}\.safetensors(\.[\d-]+\.partial)?")
CHUNK = 64 * 2**20  # bytes under one checksum, so that several cores check a file at once
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors calls them


class FeatureCache:
    """Stored features of whole views, one safetensors file each, in `folder`.

    A key is a dict of plain values: everything that determines the features. It names the file and stands in its
    header, so features of another backbone, size, augmentation, data set or version are never taken for the ones
    asked for, and stay where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
        self._last: Future | None = None

    def path(self, key: dict[str, Any]) -> Path:
        """The file that the features of this key have."""
        view = "plain" if key.get("view") is None else f"view{key['view']}"
        digest = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.folder / f"{key.get('split', 'features')}-{view}-{digest[:24]}.safetensors"

    def load(self, key: dict[str, Any]) -> Tensor | None:
        """The features, memory-mapped, after their checksum was verified; None where there are none to use.

        A file that is torn or altered, or that holds other features than its name says, is reported in one line.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            features, metadata = _read(path)
            intact = metadata["crc32"] == _checksums(features)
        except Exception as error:  # bytes that are no safetensors file make the reader fail in every way there is
            _say(f"{path} is torn ({type(error).__name__}): extracting its features again")
            return None
        if metadata.get("key") != _canonical(key):
            _say(f"{path} holds other features than its name says: not used, and left as it is")
            return None
        if not intact:
            _say(f"{path} is altered (its checksum differs): extracting its features again")
            return None
        return features

    def require_space(self, needed: int, advice: str) -> None:
        """Raise errors.EnvironmentFault unless the disk has room for `needed` more bytes."""
        free = self.free()
        if needed > free:
            raise EnvironmentFault(
                f"the features need {gigabytes(needed)} in {self.folder}, where {gigabytes(free)} are free: {advice}"
            )

    def free(self) -> int:
        """Bytes free on the disk, which need not have the folder yet."""
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def draft(self, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> "Draft | None":
        """A new file to fill; None where it cannot be made, which is said, or where its name is taken."""
        path = self.path(key)
        if path.exists() and _is_of_another_key(path, key):
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Draft(path, key, shape, dtype)
        except (OSError, RuntimeError) as error:
            _say(f"{path} cannot be written ({_reason(error)}): going on without it; see --features.cache_dir")
            return None

    def commit(self, draft: "Draft") -> None:
        """Give a filled draft its name, in the background: training need not wait for a disk.

        A failure is reported, and ends nothing. Python waits for the last file before it exits.
        """
        self.wait()
        self._last = self._background.submit(draft.finish)

    def wait(self) -> None:
        """Until the file that is being finished has its name."""
        if self._last is not None:
            self._last.result()


class Draft:
    """A feature file under a temporary name: fill `tensor`, which is the mapped file itself, then `finish`.

    Raises OSError where the disk is full: all of its space is taken at once, since a mapped page that finds no
    room would end the process.
    """

    def __init__(self, path: Path, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self.key = path, key
        size = torch.Size(shape).numel() * dtype.itemsize
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        self._shape, self._dtype, self._size = shape, dtype, size
        header = self._header(["0" * 8] * (-(-size // CHUNK)))
        try:
            with open(self.temporary, "wb") as file:
                file.write(header)
                _take_space(file.fileno(), len(header), size)
            whole = torch.from_file(str(self.temporary), shared=True, size=len(header) + size, dtype=torch.uint8)
        except BaseException:  # Ctrl-C as well: nothing half made stays behind
            self.discard()
            raise
        self.tensor = whole[len(header) :].view(dtype).view(shape)

    def finish(self) -> bool:
        """Write the checksums, flush everything to the disk, rename. Returns whether that worked; says if not."""
        try:
            header = self._header(_checksums(self.tensor).split())
            with open(self.temporary, "rb+") as file:
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.temporary, self.path)
            return True
        except OSError as error:
            _say(f"{self.path} could not be kept ({_reason(error)}): its features will be extracted again next time")
            return False
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file; what is mapped stays readable."""
        with suppress(OSError):
            self.temporary.unlink()

    def _header(self, checksums: list[str]) -> bytes:
        """The safetensors header: its length is the same whatever the checksums are."""
        metadata = {"key": _canonical(self.key), "crc32": " ".join(checksums)}
        tensor = {"dtype": NAMES[self._dtype], "shape": list(self._shape), "data_offsets": [0, self._size]}
        text = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
        text += b" " * (-(len(text) + 8) % 64)  # features begin at an aligned address
        return len(text).to_bytes(8, "little") + text


def gigabytes(size: float) -> str:
    """Bytes as people say them: 12.3 GB, 45 MB, 3 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _canonical(key: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The mapped tensor and the metadata. safetensors verifies that header and file size agree."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(TENSOR), file.metadata() or {}


def _is_of_another_key(path: Path, key: dict[str, Any]) -> bool:
    try:
        return _read(path)[1].get("key") != _canonical(key)
    except UNREADABLE:  # torn: it may be replaced
        return False


def _checksums(features: Tensor) -> str:
    """CRC-32 of every 64 MiB, on several cores: it tells a torn or altered file, and costs less than reading one."""
    if not features.numel():
        return ""
    view = memoryview(features.reshape(-1).view(torch.uint8).numpy())
    parts = [view[start : start + CHUNK] for start in range(0, len(view), CHUNK)]
    with ThreadPoolExecutor(min(16, len(parts), os.cpu_count() or 1)) as pool:
        return " ".join(f"{value:08x}" for value in pool.map(zlib.crc32, parts))


def _take_space(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, start + size)
    else:  # macOS and Windows: a file with holes, whose space was only checked
        os.truncate(descriptor, start + size)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:160]


def _say(message: str) -> None:
    print(f"features: {message}", file=sys.stderr, flush=True)


def _entries(folder: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The files that the cache named and their keys; None for one that is unfinished or torn."""
    for path in sorted(path for path in folder.glob("*") if OWN_NAME.fullmatch(path.name)):
        try:
            key = json.loads(_read(path)[1]["key"])
        except UNREADABLE:
            key = None
        yield path, key


def _list(folder: Path) -> None:
    total = 0
    for path, key in _entries(folder):
        size = path.stat().st_size
        total += size
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        if key is None or path.suffix == ".partial":
            about = "torn" if key is None else "unfinished"
        else:
            view = "plain" if key.get("view") is None else f"view {key['view']}"
            about = (
                f"{key.get('split')}, {view}, data {str(key.get('data'))[:8]}, {key.get('backbone')} "
                f"{str(key.get('weights'))[:8]}, {key.get('storage')}, format {key.get('format')}"
            )
        print(f"{gigabytes(size):>9}  {written}  {about}  {path.name}")
    print(f"{gigabytes(total):>9}  in {folder}")


def _clear(folder: Path) -> None:
    count = total = 0
    for path, _ in list(_entries(folder)):
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be deleted: {error.strerror}") from error
        count, total = count + 1, total + size
    print(f"deleted {count} files, {gigabytes(total)}, from {folder}")


def main(argv: list[str] | None = None) -> None:
    """List or clear the stored features."""
    parser = argparse.ArgumentParser(
        prog="python -m data.feature_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "clear"))
    parser.add_argument("--dir", type=Path, default=DEFAULT_FOLDER, help=f"default: {DEFAULT_FOLDER}")
    options = parser.parse_args(argv)
    folder = options.dir.expanduser()
    if options.dir != DEFAULT_FOLDER and not folder.is_dir():
        raise UserError(f"--dir {folder} is not a folder: name the one that --features.cache_dir names")
    (_list if options.command == "list" else _clear)(folder)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
