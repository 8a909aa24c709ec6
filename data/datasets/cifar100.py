"""CIFAR-100 (Krizhevsky 2009), with fine and coarse labels, from the official files that torchvision downloads."""

import hashlib
import pickle
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from common.errors import EnvironmentFault, UserError, say
from common.files import write_atomically
from common.network import reachable
from common.text import quoted
from data.image_set import ImageSet
from data.registry import Parts, register


@register(
    "cifar100",
    about="CIFAR-100, 60,000 images of 100 classes, 32 x 32, downloaded by torchvision",
    options=("root", "download"),
    default_root="data",
    side=32,
    published=True,
)
def load(config) -> Parts:
    """The official train and test split."""
    train, test = load_cifar100(config.place, config.download)
    return train, None, test


def load_cifar100(root: Path, download: bool = True) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, from `root`/cifar-100-python.

    The files are unpickled only if their MD5 sums match the official ones, so an altered file never runs code. Raises
    UserError for an altered file, EnvironmentFault if files are missing and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR100

    folder = root / CIFAR100.base_folder
    files = dict([*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])])
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        _reject_inner_folder(root, folder, files)
        if not _unpacked(root / CIFAR100.filename, folder, files):
            _download(root, folder, missing, download)
    contents = {name: _verified(folder / name, md5) for name, md5 in files.items()}
    meta = pickle.loads(contents["meta"], encoding="latin1")
    return _image_set(contents["train"], meta), _image_set(contents["test"], meta)


def _reject_inner_folder(root: Path, folder: Path, files: Iterable[str]) -> None:
    """Raise UserError if the files are in `root` itself instead of its folder cifar-100-python."""
    if all((root / name).is_file() for name in files):
        at_home = root.absolute().name == folder.name
        parent = quoted(root.absolute().parent)
        remedy = f"name its parent, --data.root {parent}" if at_home else f"move them to {folder}"
        raise UserError(f"--data.root {root} is the folder with the files of CIFAR-100: {remedy}")


def _unpacked(archive: Path, folder: Path, files: Iterable[str]) -> bool:
    """Unpack the official archive into `folder` if it is there; returns whether it was.

    Raises UserError if it is altered, EnvironmentFault if it cannot be read or its files cannot be written.
    """
    from torchvision.datasets import CIFAR100

    if not archive.is_file():
        return False
    content = _verified(archive, CIFAR100.tgz_md5)
    say(f"unpacking CIFAR-100 from {archive}")
    with tarfile.open(fileobj=BytesIO(content)) as members:
        for name in files:
            inner = members.extractfile(f"{folder.name}/{name}").read()
            write_atomically(folder / name, lambda temporary, inner=inner: temporary.write_bytes(inner))
    return True


def _download(root: Path, folder: Path, missing: list[str], download: bool) -> None:
    from torchvision.datasets import CIFAR100

    lacking = f"CIFAR-100 is incomplete: {', '.join(missing)} not found in {folder}"
    remedy = (
        f"put {CIFAR100.filename} into {root} (from {CIFAR100.url}), name its folder with --data.root, "
        "or train without a download: python train.py --config configs/digits.yaml"
    )
    if not download:
        raise UserError(f"{lacking}, and --data.download is false; {remedy}")
    if not reachable(CIFAR100.url):
        raise EnvironmentFault(f"{lacking}, and {urlparse(CIFAR100.url).hostname} cannot be reached; {remedy}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        CIFAR100(root, download=True)
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(f"{lacking}, and the download failed ({error}); {remedy}") from error


def _verified(path: Path, md5: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}; fix its permissions or its disk") from error
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise UserError(
            f"{path} is not the official file of CIFAR-100 (MD5 {found}, expected {md5}, {len(content)} bytes): "
            "it is truncated or altered; delete it and run again to download it"
        )
    return content


def _image_set(content: bytes, meta: dict) -> ImageSet:
    # A pickle of Python 2; with latin1 all pixels would first be decoded as text.
    entries = pickle.loads(content, encoding="bytes")
    pixels_NCHW = np.asarray(entries[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
    return ImageSet(
        images_NCHW=torch.from_numpy(pixels_NCHW),
        labels_N=torch.tensor(entries[b"fine_labels"], dtype=torch.int64),
        class_names=tuple(meta["fine_label_names"]),
        coarse_N=torch.tensor(entries[b"coarse_labels"], dtype=torch.int64),
        coarse_names=tuple(meta["coarse_label_names"]),
    )
