"""The registry of data sets: what each is called, how it is loaded, which options it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.image_set import ImageSet
    from data.splits import DataConfig

# Train, validation and test, None where the data set has none of its own: part of train takes its place.
Parts = tuple["ImageSet", "ImageSet | None", "ImageSet | None"]


@dataclass(frozen=True)
class Dataset:
    """A data set that data.name can name.

    about: what it is and where it comes from, for --help. options: the fields of DataConfig that it reads besides
    those of every data set. default_root: where it lies if data.root does not say. side: of its images in pixels,
    where it is not data.image_size. grey: whether they have no colour. published: whether all users have the same
    images, so that copies among them are known.
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
    """What is registered, for --help."""
    return "; ".join(f"{name}: {DATASETS[name].about}" for name in sorted(DATASETS))


def register(name: str, **facts) -> Callable[[Callable[[DataConfig], Parts]], Callable[[DataConfig], Parts]]:
    """Make a function that loads a data set known as `name`. facts: the other fields of `Dataset`.

    The function gets the DataConfig and returns train, validation and test. Raises ValueError for a name that is
    taken.
    """

    def add(load: Callable[[DataConfig], Parts]) -> Callable[[DataConfig], Parts]:
        if name in DATASETS:
            raise ValueError(f"a data set '{name}' is registered already: choose another name")
        DATASETS[name] = Dataset(load, **facts)
        return load

    return add
