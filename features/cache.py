"""The disk cache of features, one file per view, under a key of everything that determines them; with a tool.

python -m features.cache list                                 stored features and their keys
python -m features.cache clear --dry_run                      what clear would delete, and its size
python -m features.cache clear KEY ... --older_than 30        delete only features that match all conditions
python -m features.cache clear                                delete all features that no process is using
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.arguments import Parser, path_option
from common.errors import EnvironmentFault, UserError, exit_code_of
from common.locks import try_lock
from common.paths import absolute
from common.text import command, counted, printable
from config.features import DEFAULT_FOLDER
from features.file import UNREADABLE, Draft, canonical, checksums, gigabytes, read, reason, say

OWN_NAME = re.compile(r"\.?\w+-(plain|view\d+)-([0-9a-f]{24})\.safetensors(\.[\d-]+\.partial)?")


class FeatureCache:
    """Features on disk, one safetensors file per view, in `folder`.

    A key is a dict of plain values: everything that determines the features. It names the file and is in its header, so
    features of another backbone, size, augmentation, dataset or version are never used by mistake, and are not deleted.
    Files that were read or written stay locked, so that no other process deletes them. dataset: a name for `list`.
    """

    def __init__(self, folder: Path, dataset: str = ""):
        self.folder, self.dataset = absolute(folder), dataset
        self._held: dict[Path, int] = {}  # open file descriptors; only `_release` closes them
        weakref.finalize(self, _release, self._held)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
        self._last: Future | None = None

    def path(self, key: dict[str, Any]) -> Path:
        """The file of the features of this key."""
        view = "plain" if key.get("view") is None else f"view{key['view']}"
        digest = hashlib.sha256(canonical(key).encode()).hexdigest()
        return self.folder / f"{key.get('split', 'features')}-{view}-{digest[:24]}.safetensors"

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a readable file for this key; its checksum is not verified."""
        try:
            read(self.path(key))
        except UNREADABLE:
            return False
        return True

    def load(self, key: dict[str, Any]) -> Tensor | None:
        """The features, memory-mapped, after their checksum was verified; None if there are none.

        A truncated or altered file, or one whose name and key differ, is reported in one line.
        """
        path = self.path(key)
        with suppress(OSError), path.open("rb") as file:
            self._hold(path, file)
        if not path.exists():
            return None
        try:
            features, metadata = read(path)
            intact = metadata["crc32"] == checksums(features)
        except Exception as error:  # the reader raises all kinds of errors on corrupt files
            say(f"{path} is corrupt ({type(error).__name__}): extracting its features again")
            return None
        if metadata.get("key") != canonical(key):
            clear = command("-m", "features.cache", "clear", Entry.digest(path), "--dir", self.folder)
            say(f"{path} contains other features than its name says: ignored; {clear} deletes it")
            return None
        if not intact:
            say(f"{path} is altered (its checksum differs): extracting its features again")
            return None
        return features

    def require_space(self, needed: int, advice: str) -> None:
        """Raise EnvironmentFault unless the disk has room for `needed` more bytes."""
        free = self.free()
        if needed > free:
            raise EnvironmentFault(
                f"the features need {gigabytes(needed)} in {self.folder}, but only {gigabytes(free)} are free: {advice}"
            )

    def free(self) -> int:
        """Bytes free on the disk; the folder need not exist yet."""
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def draft(self, key: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> "Draft | None":
        """A new file to fill; None if it cannot be created (with a warning) or already exists."""
        path = self.path(key)
        if path.exists() and _is_of_another_key(path, key):
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned(path)
            return Draft(path, key, shape, dtype, self.dataset)
        except (OSError, RuntimeError) as error:
            say(f"{path} cannot be written ({reason(error)}): continuing without it; see --features.cache_dir")
            return None

    def _remove_abandoned(self, path: Path) -> None:
        """Remove unfinished copies of this file from killed processes: a day old, in case locks do not work."""
        for left in self.folder.glob(f".{path.name}.*.partial"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 86400:
                    _delete(left, dry_run=False)

    def commit(self, draft: "Draft") -> None:
        """Finish a filled draft in the background, so that training need not wait for the disk.

        A failure is reported and not raised. Python waits for the last file before it exits.
        """
        self.wait()
        self._hold(draft.path, draft.file)  # still valid after the file is closed
        self._last = self._background.submit(draft.finish)

    def _hold(self, path: Path, file: IO) -> None:
        """Keep a file locked while this object lives, instead of an earlier file of that name.

        A duplicate descriptor keeps the lock, so that the file may be closed.
        """
        try_lock(file, shared=True)
        with suppress(OSError):  # out of descriptors: the file stays unlocked
            before, self._held[path] = self._held.get(path), os.dup(file.fileno())
            if before is not None:
                os.close(before)

    def wait(self) -> None:
        """Wait until the last file is finished."""
        if self._last is not None:
            self._last.result()


def _release(held: dict[Path, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def _is_of_another_key(path: Path, key: dict[str, Any]) -> bool:
    try:
        return read(path)[1].get("key") != canonical(key)
    except UNREADABLE:  # corrupt: may be replaced
        return False


@dataclass(frozen=True)
class Entry:
    """A file of the cache. metadata: of its header; None if it is corrupt."""

    path: Path
    size: int
    written: float
    metadata: dict[str, Any] | None

    @property
    def key(self) -> str:
        """The digest in the file's name, which `list` shows and `clear` accepts."""
        return self.digest(self.path)

    @staticmethod
    def digest(path: Path) -> str:
        """The digest in a file name of the cache."""
        return OWN_NAME.fullmatch(path.name)[2]

    def fits(self, options: argparse.Namespace) -> bool:
        """Whether it matches all conditions."""
        known = self.metadata or {}
        return (
            (not options.keys or any(self.key.startswith(key) for key in options.keys))
            and options.dataset in (None, known.get("dataset"))
            and options.backbone in (None, known.get("backbone"))
            and (options.older_than is None or time.time() - self.written > 86400 * options.older_than)
        )

    def line(self) -> str:
        """Key, size, date and content."""
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.written))
        about = "corrupt" if self.metadata is None else "unfinished"
        if self.metadata is not None and self.path.suffix != ".partial":
            known = self.metadata
            view = "plain" if known.get("view") is None else f"view {known['view']}"
            data = " ".join(part for part in (known["dataset"], str(known.get("data"))[:8]) if part)
            backbone = f"{known.get('backbone')} {str(known.get('weights'))[:8]}"
            read_of = known.get("features") or ["?"]
            blocks = " ".join(read_of) if len(read_of) < 3 else f"{read_of[0]} to {read_of[-1]} ({len(read_of)})"
            about = f"{known.get('split')}, {view}, data {data}, {backbone}, {blocks}, {known.get('storage')}"
            changes = [f"{name} {value}" for name, value in (known.get("augment") or {}).items() if value]
            about += ", " + " ".join(changes) if changes else ""
        return f"{self.key[:10]}  {gigabytes(self.size):>9}  {written}  {about}"


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(path for path in folder.glob("*") if OWN_NAME.fullmatch(path.name)):
        try:
            header = read(path)[1]
            metadata = {**json.loads(header["key"]), "dataset": header.get("dataset", "")}
        except UNREADABLE:
            metadata = None
        with suppress(FileNotFoundError):  # meanwhile finished or deleted
            yield Entry(path, path.stat().st_size, path.stat().st_mtime, metadata)


def _list(folder: Path, entries: list[Entry]) -> None:
    for entry in entries:
        print(entry.line())
    print(f"{gigabytes(sum(entry.size for entry in entries))} in {printable(folder)}")


def _clear(folder: Path, entries: list[Entry], options: argparse.Namespace) -> None:
    """Delete, or only show, the files that no process uses."""
    count = total = 0
    for entry in entries:
        try:
            deleted = _delete(entry.path, options.dry_run)
        except FileNotFoundError:  # meanwhile finished or deleted
            continue
        except OSError as error:
            raise EnvironmentFault(f"{entry.path} cannot be deleted: {error.strerror}") from error
        print(entry.line() + ("" if deleted else "; kept: a running process uses it"))
        count, total = count + deleted, total + deleted * entry.size
    done = "would delete" if options.dry_run else "deleted"
    print(f"{done} {counted(count, 'file')}, {gigabytes(total)}, from {printable(folder)}")


def _delete(path: Path, dry_run: bool) -> bool:
    """Remove a file unless `dry_run`; returns False, without removing it, if a running process uses it."""
    with path.open("rb+") as file:
        if not try_lock(file):
            return False
        if not dry_run:
            path.unlink()
    return True


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="-m features.cache",
        usage="python %(prog)s {list,clear} [KEY ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("list", "clear"), metavar="list|clear", help="show, or delete")
    # Without a default, argparse would require it.
    parser.add_argument(
        "keys", nargs="*", default=[], metavar="KEY", help="only this key, as shown by list, or its start"
    )
    parser.add_argument("--data.name", dest="dataset", metavar="NAME", help="only features of this dataset")
    parser.add_argument("--backbone.name", dest="backbone", metavar="NAME", help="only features of this backbone")
    parser.add_argument("--older_than", type=float, metavar="DAYS", help="only files older than this")
    parser.add_argument("--dry_run", action="store_true", help="show what clear would delete, without deleting")
    parser.add_argument("--dir", type=path_option, default=absolute(DEFAULT_FOLDER), help=f"default: {DEFAULT_FOLDER}")
    options = parser.parse_args(argv)
    if options.older_than is not None and not 0 <= options.older_than < math.inf:
        raise UserError(f"--older_than is {options.older_than:g}: it must be a number of days, 0 or more")
    if "" in (*options.keys, options.dataset, options.backbone):
        raise UserError("an empty KEY or name selects nothing: give one that list shows, or leave it out to select all")
    return options


def main(argv: list[str] | None = None) -> None:
    """List or clear the stored features."""
    options = _options(argv)
    folder = options.dir
    if folder != absolute(DEFAULT_FOLDER) and not folder.is_dir():
        raise UserError(f"--dir {folder} is not a folder: name the folder of --features.cache_dir")
    entries = [entry for entry in _entries(folder) if entry.fits(options)]
    selected = any((options.keys, options.dataset, options.backbone, options.older_than is not None))
    if selected and not entries:
        raise UserError(f"no features in {folder} match: `list` without options shows all")
    if options.command == "list":
        _list(folder, entries)
    else:
        _clear(folder, entries, options)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
