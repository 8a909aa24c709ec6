"""Arrays of images and labels: a NumPy .npz file, or a folder of Parquet files from the Hugging Face Hub."""

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import EnvironmentFault, UserError, one_line, warn
from common.memory import available_memory
from common.text import counted, printable
from data.image_file import centre_square, decode_picture
from data.image_set import ImageSet, empty_images
from data.image_tree import SPLITS, hidden
from data.registry import Parts, register

SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
IMAGES, LABELS = ("images", "image", "x", "data"), ("labels", "label", "y", "targets")  # names of arrays and columns
NAMES = ("names", "class_names", "classes")


@dataclass
class Table:
    """A stored split: images uint8 (N, 3, S, S), and one label per image, an integer or a string."""

    images_NCHW: Tensor
    labels_N: np.ndarray


@register(
    "arrays",
    about="your own images in an .npz file (images, labels, names) or in Parquet files of the Hugging Face Hub",
    options=("root", "image_size"),
)
def load(config) -> Parts:
    """Train, validation (or None) and test (or None) of the file or folder that data.root names.

    Raises UserError if there are no images and labels, EnvironmentFault if pyarrow is missing.
    """
    root = config.require_place("an .npz file, or a folder of .parquet files")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"--data.root {root} does not exist: name an .npz file, or a folder of .parquet files")
    tables, names = (_read_parquet if root.is_dir() else _read_npz)(root, config.image_size)
    if "train" not in tables:
        raise UserError(f"{root} has only {' and '.join(tables)} images: the training images are missing")
    if not names:  # the classes are the labels of the training images
        values = np.unique(tables["train"].labels_N)
        names = [str(value) for value in values]
        for split, table in tables.items():
            table.labels_N = _places(root, split, table.labels_N, values)
    if len(names) < 2:
        raise UserError(f"{root} has {counted(len(names), 'class')}: a classifier needs at least 2")
    parts = {split: _image_set(root, split, table, names) for split, table in tables.items()}
    return parts["train"], parts.get("validation"), parts.get("test")


def _places(root: Path, split: str, labels_N: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of each label among the sorted training labels."""
    if labels_N.dtype.kind == "i" and len(labels_N) and labels_N.min() < 0:
        raise UserError(f"{root} has the {split} label {labels_N.min()}: leave out images without a label")
    unknown = np.setdiff1d(labels_N, values)
    if len(unknown):
        raise UserError(f"{root} has the {split} label '{unknown[0]}', which no training image has")
    return np.searchsorted(values, labels_N)


def _image_set(root: Path, split: str, table: Table, names: Sequence[str]) -> ImageSet:
    labels_N = table.labels_N
    if len(labels_N) != len(table.images_NCHW):
        raise UserError(
            f"{root} has {counted(len(table.images_NCHW), f'{split} image')} but {counted(len(labels_N), 'label')}"
        )
    if labels_N.dtype.kind not in "iu":
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(labels_N.tolist()) - numbers.keys()):
            raise UserError(f"{root} has the {split} label '{unknown[0]}', which is not one of its names")
        labels_N = np.array([numbers[label] for label in labels_N.tolist()])
    elif len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < len(names):
        raise UserError(
            f"{root} has {split} labels from {labels_N.min()} to {labels_N.max()}: its {len(names)} classes have 0 to "
            f"{len(names) - 1}"
        )
    shown = tuple(map(printable, names))
    return ImageSet(table.images_NCHW, torch.from_numpy(labels_N.astype(np.int64)), shown)


def _read_npz(path: Path, size: int) -> tuple[dict[str, Table], list[str]]:
    """images and labels; or train_images, train_labels, test_images, ...; or x_train, y_train, ...; names optional."""
    try:
        with zipfile.ZipFile(path) as archive:
            _require_memory(path, sum(record.file_size for record in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            tables, sides = {}, set()
            for split, (images, labels) in _by_split(path, arrays.files).items():
                pixels_NHWC = _pixels(f"{images} in {path}", arrays[images])
                sides.add(pixels_NHWC.shape[1:3])
                tables[split] = Table(_resized(pixels_NHWC, size), _labels(f"{labels} in {path}", arrays[labels]))
            names = next((arrays[name].ravel().astype(str) for name in NAMES if name in arrays.files), ())
    except UserError:
        raise
    except Exception as error:  # the readers raise all kinds of errors on other files
        reason = one_line(error, 120) or type(error).__name__
        raise UserError(f"{path} is not an .npz file of plain arrays ({reason}): write it with numpy.savez") from error
    height, width = min(sides)
    if min(height, width) < size:
        warn(f"images of {height} x {width} are enlarged to {size} x {size}: --data.image_size {height} keeps them")
    return tables, [str(name) for name in names]


def _require_memory(path: Path, claimed: int) -> None:
    free = available_memory()
    if free is not None and claimed > free:
        raise EnvironmentFault(
            f"{path} contains {claimed / 1e9:,.1f} GB of arrays, but only {free / 1e9:,.1f} GB of memory are free: use "
            "smaller or fewer images, or image files and --data.name folder"
        )


def _by_split(path: Path, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{split: (name of its images, name of its labels)} among the names of the arrays in a file."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        words = key.lower().split("_")
        split = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "train")
        rest = [word for word in words if word not in SPLIT_OF]
        for kind, names in (("images", IMAGES), ("labels", LABELS)):
            if len(rest) == 1 and rest[0] in names:
                found.setdefault(split, {}).setdefault(kind, key)
    whole = {split: (pair["images"], pair["labels"]) for split, pair in found.items() if len(pair) == 2}
    if not whole:
        raise UserError(
            f"{path} contains {', '.join(keys) or 'nothing'}: expected the arrays images and labels, or train_images, "
            "train_labels, test_images, test_labels"
        )
    return whole


def _pixels(name: str, images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) from (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), with values 0 to 255 or 0.0 to 1.0."""
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{name} has the shape {images.shape}: expected (N, H, W), (N, H, W, 3) or (N, 3, H, W)")
    if images.dtype != np.uint8:
        if images.dtype.kind not in "biuf" or not 0 <= images.min() <= images.max() <= 255:  # NaN is neither
            raise UserError(
                f"{name} has values outside 0 to 255, or NaN ({images.dtype}): scale them to 0 to 255 or 0 to 1"
            )
        unit = images.dtype.kind in "bf" and images.max() <= 1
        images = np.round(images * np.float32(255 if unit else 1)).astype(np.uint8)
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _labels(name: str, labels: np.ndarray) -> np.ndarray:
    """(N,) integers or strings, from (N,) or (N, 1)."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1:
        raise UserError(f"{name} has the shape {labels.shape}: expected one label for each image, (N,)")
    if labels.dtype.kind == "b" or (labels.dtype.kind == "f" and (labels == np.floor(labels)).all()):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iuU":
        raise UserError(f"{name} has type {labels.dtype}: expected integers or strings")
    return labels


def _resized(pixels_NHWC: np.ndarray, size: int) -> Tensor:
    """uint8 (N, 3, size, size): the centre squares, resized (bicubic) as image files are."""
    images_NCHW = empty_images(len(pixels_NHWC), size)
    for row, pixels_HWC in enumerate(pixels_NHWC):
        square = centre_square(Image.fromarray(np.ascontiguousarray(pixels_HWC)))
        small = square if square.size == (size, size) else square.resize((size, size), Image.Resampling.BICUBIC)
        images_NCHW[row] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return images_NCHW


def _read_parquet(root: Path, size: int) -> tuple[dict[str, Table], list[str]]:
    """Read rows with the bytes of an image file and a label; file or folder names give the splits."""
    shown = (path for path in root.rglob("*.parquet") if not any(map(hidden, path.relative_to(root).parts)))
    files = sorted(path for path in shown if path.is_file())
    if not files:
        raise UserError(f"{root} has no .parquet file: name a folder of them, an .npz file, or use data.name folder")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise EnvironmentFault(f"{files[0]} can only be read with pyarrow: pip install pyarrow") from error
    by_split: dict[str, list[Any]] = {}
    names: list[str] = []
    label = "label"
    for path in files:
        try:
            source = parquet.ParquetFile(path)
            image, label, found = _columns(path, source.schema_arrow)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {one_line(error, 120)}") from error
        names = names or found
        by_split.setdefault(_split_of(path.relative_to(root)), []).append((path, source, image, label))
    tables = {}
    for split, sources in by_split.items():
        images_NCHW = empty_images(sum(source.metadata.num_rows for _, source, _, _ in sources), size)
        labels = []
        for name, content, value in (row for found in sources for row in _rows(*found)):
            images_NCHW[len(labels)] = decode_picture(content, f"the image in {name}", size).pixels_CHW
            labels.append(value)
        tables[split] = Table(images_NCHW, _labels(f"{label} in {root}", np.array(labels)))
    return tables, names


def _split_of(path: Path) -> str:
    """train-00000-of-00002.parquet, default/test/0000.parquet: the last word that names a split, else train."""
    words = [word for part in path.parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), "train")


def _columns(path: Path, schema: Any) -> tuple[str, str, list[str]]:
    """The columns of images and labels, and the class names if the file has them."""
    from pyarrow import types

    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    images = [
        field.name
        for field in schema
        if types.is_binary(field.type) or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    classes = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
    labels = [name for name in (*classes, *LABELS) if name in schema.names]
    if not images or not labels:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}: expected one with the bytes of image files and one "
            "named label"
        )
    return images[0], labels[0], [str(name) for name in features.get(labels[0], {}).get("names", [])]


def _rows(path: Path, source: Any, image: str, label: str) -> Iterator[tuple[str, bytes, Any]]:
    """(its name, bytes of an image file, label) of each row, a few at a time."""
    from pyarrow import ArrowException

    row = 0
    try:
        for batch in source.iter_batches(batch_size=256, columns=[image, label]):
            for content, value in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
                file = content["bytes"] if isinstance(content, dict) else content
                if file is None:
                    raise UserError(f"row {row} of {path} has no bytes of an image: export the dataset with its images")
                yield f"row {row} of {path}", file, value
                row += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {one_line(error, 120)}") from error
