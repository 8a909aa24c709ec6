"""Finds image files, class folders and splits, for training and prediction.

An image file is a regular file with the extension of a format that Pillow reads, at any depth of a folder. Hidden files
and folders are ignored. Links are followed, but never to a parent folder, and each file counts once; it belongs to one
class of one split. A warning for each reason says what is left out.
"""

import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from common.errors import EnvironmentFault, UserError, warn

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
UNREADABLE_FORMATS = {
    "EPS",
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
    "WMF",
}  # EPS runs a program; of the others Pillow reads only the header
HIDDEN = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}

SHARED = "has no separate image: each is also in another class or split, through a link: keep it in only one"


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow reads without running a program."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - UNREADABLE_FORMATS))


@cache
def endings() -> frozenset[str]:
    """Their extensions, in lower case and with the dot."""
    known = {*formats(), "MPO"}  # a camera's photo with previews, opened by the JPEG reader
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is ignored: dot files, and files that operating systems create."""
    return name.startswith(".") or name.lower() in HIDDEN


@dataclass(frozen=True)
class ImageFile:
    """path: as found. key: the same for all names of one file, None if it cannot be read. linked: whether it was found
    through a link."""

    path: Path
    key: tuple[int, int] | None
    linked: bool


@dataclass
class Skipped:
    """Files and folders that a search leaves out, by reason."""

    files: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)
    repeated: list[tuple[Path, Path]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def warn(self) -> None:
        """Print one warning for each reason, with the first example."""
        kinds = Counter(path.suffix.lower() or "none" for path in self.files).most_common(5)
        reasons = {
            f"left out: not the extension of an image ({', '.join(kind for kind, _ in kinds)})": self.files,
            "left out: not a regular file": self.special,
            "left out: not in a class folder": self.outside,
            f"left out: not the name of a split ({', '.join(sum(SPLITS.values(), ()))})": self.folders,
            "not followed: it links to a parent folder": self.loops,
            "counted once": [f"{path} is {kept} by another name" for path, kept in self.repeated],
        }
        for reason, found in reasons.items():
            if found:
                warn(f"{reason}: {found[0]}" + (f", and {len(found) - 1:,} more" if len(found) > 1 else ""))


def find_images(path: Path) -> list[Path]:
    """The file itself, or the images at any depth of a folder, sorted by folder and name, each file once.

    Does not check whether a file exists. Raises UserError for a folder without an image, EnvironmentFault for one that
    cannot be read.
    """
    if not path.is_dir():
        return [path]
    skipped = Skipped()
    found = _once(_walk(path, (os.path.realpath(path),), False, skipped), skipped)
    skipped.warn()
    if not found:
        raise UserError(f"{path} has no file with the extension of an image, such as .png or .jpg")
    return [file.path for file in found]


def _once(found: Sequence[ImageFile], skipped: Skipped) -> list[ImageFile]:
    """One name for each file: its real path rather than a link, else the first in order."""
    kept: dict[object, ImageFile] = {}
    for file in sorted(found, key=lambda file: file.linked):
        first = kept.setdefault(file.key or file.path, file)
        if first is not file:
            skipped.repeated.append((file.path, first.path))
    return sorted(kept.values(), key=lambda file: (str(file.path.parent), file.path.name))


def _walk(folder: Path, above: tuple[str, ...], linked: bool, skipped: Skipped) -> list[ImageFile]:
    """Every image below a folder. Links to folders come last, so that files are first found at their real path.

    above: real folders that a link must not lead to, nor to their parents. linked: whether `folder` was found through a
    link.
    """
    found: list[ImageFile] = []
    seen: dict[tuple[int, int], Path] = {}
    folders, links = deque([(folder, above, linked)]), deque()
    while folders or links:
        place, above, linked = (folders or links).popleft()
        if (key := _key(place.stat())) in seen:
            skipped.repeated.append((place, seen[key]))
            continue
        seen[key] = place
        for path, status, is_link in _entries(place):
            if not _is_folder(status):
                if _is_image(path, status, skipped):
                    found.append(ImageFile(path, status and _key(status), linked or is_link))
            elif not is_link:
                folders.append((path, above, linked))
            elif _leads_back(path, (*above, os.path.realpath(place))):
                skipped.loops.append(path)
            else:
                links.append((path, (*above, os.path.realpath(place)), True))
    return found


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _is_image(path: Path, status: os.stat_result | None, skipped: Skipped) -> bool:
    if path.suffix.lower() not in endings():
        skipped.files.append(path)
    elif status is not None and not stat.S_ISREG(status.st_mode):  # opening a pipe could wait forever
        skipped.special.append(path)
    else:  # also a broken link: reading it gives the error
        return True
    return False


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result | None, bool]]:
    """(path, status of its target, whether it is a link) of all entries that are not hidden, in order."""
    try:
        with os.scandir(folder) as entries:
            shown = sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be read: {error.strerror}; fix its permissions") from error
    for entry in shown:
        try:
            status = entry.stat()
        except OSError:  # a broken link, or one to itself
            status = None
        yield folder / entry.name, status, entry.is_symlink()


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _leads_back(link: Path, chain: Sequence[str]) -> bool:
    """Whether a link leads to one of the real folders in `chain`, or to a parent of one."""
    target = os.path.join(os.path.realpath(link), "")
    return any(os.path.join(place, "").startswith(target) for place in chain)


def find_splits(root: Path, skipped: Skipped) -> dict[str, Path]:
    """The folder of each split in `root`: train, validation, test, under any of their names.

    A root without any of them, with two class folders or more, is the train folder itself. Raises UserError if two
    folders are the same split, or none is train.
    """
    meant = {name: split for split, names in SPLITS.items() for name in names}
    found: dict[str, Path] = {}
    for path, status, _ in _entries(root) if root.is_dir() else ():
        if not _is_folder(status):
            continue
        split = meant.get(path.name.lower())
        if split is None:
            skipped.folders.append(path)
        elif split in found:
            raise UserError(f"{root} has both {found[split].name}/ and {path.name}/: keep the one to use as {split}")
        else:
            found[split] = path
    if not found and len(skipped.folders) > 1 and root.name.lower() not in meant:
        skipped.folders.clear()
        return {"train": root}
    if "train" not in found:
        _require_train(root, meant)
    return {split: found[split] for split in SPLITS if split in found}


def _require_train(root: Path, meant: dict[str, str]) -> None:
    above = root.absolute().parent
    if root.name.lower() in meant and any((above / name).is_dir() for name in SPLITS["train"]):
        raise UserError(f"--data.root {root} is the {root.name} folder of a dataset: name its parent, {above}")
    raise UserError(
        f"{root / 'train'} is not a folder: --data.root needs train/CLASS/IMAGE (and optionally val/, test/), or "
        "two or more CLASS/IMAGE"
    )


def find_classes(split: Path, skipped: Skipped) -> list[Path]:
    """The class folders of a split, in order; images next to them are left out."""
    folders, real = [], os.path.realpath(split)
    for path, status, is_link in _entries(split):
        if not _is_folder(status):
            if _is_image(path, status, skipped):
                skipped.outside.append(path)
        elif is_link and _leads_back(path, (real,)):
            skipped.loops.append(path)
        else:
            folders.append(path)
    return folders


def label_files(splits: dict[str, Path], classes: Sequence[str], skipped: Skipped) -> dict[str, list[tuple[Path, int]]]:
    """The images of each split with their labels; a file has one label: that of its real path, or the first one.

    Raises UserError for a class folder that train does not have, and for a split or a training class without images.
    """
    claims: list[tuple[ImageFile, str, int]] = []
    for name, folder in splits.items():
        for place in find_classes(folder, skipped):
            if place.name not in classes:
                raise UserError(
                    f"{folder} has class folder '{place.name}' that {splits['train'].name}/ does not have: add it "
                    "there or remove it"
                )
            above = (os.path.realpath(folder), os.path.realpath(place))
            found = _walk(place, above, folder.is_symlink() or place.is_symlink(), skipped)
            claims += [(file, name, classes.index(place.name)) for file in _once(found, skipped)]
    kept = {id(file) for file in _once([file for file, _, _ in claims], skipped)}
    labelled = {}
    for name, folder in splits.items():
        claimed = {label for _, split, label in claims if split == name}
        labelled[name] = [(file.path, label) for file, split, label in claims if split == name and id(file) in kept]
        present = {label for _, label in labelled[name]}
        if not present:
            raise UserError(
                f"{folder} {SHARED if claimed else 'has no image: expected CLASS/FILE with the extension of an image'}"
            )
        for label in sorted(set(range(len(classes))) - present) if name == "train" else ():
            why = SHARED if label in claimed else "has no image: add some"
            raise UserError(f"{folder / classes[label]} {why}, or remove the folder")
    return labelled
