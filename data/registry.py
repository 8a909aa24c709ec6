"""The registry of datasets: their names, loaders and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.image_set import ImageSet
    from data.splits import DataConfig

# Train, validation and test; for None, a part of train is used.
Parts = tuple["ImageSet", "ImageSet | None", "ImageSet | None"]


@dataclass(frozen=True)
class Dataset:
    """A dataset for data.name.

    about: what it is, for --help. options: the fields of DataConfig that it reads, in addition to those that all
    datasets read. default_root: the default of data.root. side: of its images in pixels, if not data.image_size. grey:
    whether they have no colour. published: whether all users have the same images, so that duplicates among them are
    known.
    """

    load: Callable[[DataConfig], Parts]
    about: str
    options: tuple[str, ...] = ()
    default_root: str | None = None
    side: int | None = None
    grey: bool = False
    published: bool = False


DATASETS: dict[str, Dataset] = {}


def explain_datasets() -> str:
    """The registered datasets, for --help."""
    return "; ".join(f"{name}: {DATASETS[name].about}" for name in sorted(DATASETS))


def register(name: str, **facts) -> Callable[[Callable[[DataConfig], Parts]], Callable[[DataConfig], Parts]]:
    """Register a function that loads a dataset. facts: the other fields of `Dataset`.

    The function takes the DataConfig and returns train, validation and test. Raises ValueError for a name that is
    already registered.
    """

    def add(load: Callable[[DataConfig], Parts]) -> Callable[[DataConfig], Parts]:
        if name in DATASETS:
            raise ValueError(f"a dataset '{name}' is already registered: choose another name")
        DATASETS[name] = Dataset(load, **facts)
        return load

    return add
