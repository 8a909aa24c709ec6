"""Datasets, one per file, which registers itself."""

from importlib import import_module
from pkgutil import iter_modules

from data.registry import DATASETS, Dataset, register
from data.splits import DataConfig, load_splits, stratified_split

__all__ = ["DATASETS", "DataConfig", "Dataset", "load_splits", "register", "stratified_split"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
