"""Conversion of option values between text, YAML, JSON or a server's hyperparameters and the types of their fields.

All sources follow one rule. If a field accepts text, a text is used unchanged; otherwise it is parsed as YAML. A whole
number may be written as 2.0 or 1e3.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from common.paths import expanded
from config.yaml_file import spelled
from model.options import described

NULL = {"", "null", "~", "none"}
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option_types(config: type) -> dict[str, Any]:
    """The type of every option, "train.epochs", and of every section, "train", of the dataclass `config`."""
    types: dict[str, Any] = {}
    for item in fields(config):
        types[item.name] = item.type
        if is_dataclass(item.type):
            types |= {f"{item.name}.{inner.name}": inner.type for inner in fields(item.type)}
    return types


def convert(kind: Any, value: Any) -> Any:
    """`value` as type `kind`: a number, text, a path, a choice, a list, null, or one of several. Raises ValueError.

    A boolean is not a number, and a number is not a boolean.
    """
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for candidate in _meanings(value):
        for part in parts:
            with suppress(ValueError, OverflowError):  # infinite or too large
                return _as(part, candidate)
    raise ValueError(f"give {expected(kind)}")


def _meanings(value: Any) -> Iterator[Any]:
    """The possible meanings of a value: null, the value itself, or the text parsed as YAML."""
    if not isinstance(value, str):
        yield value
        return
    if value.strip().lower() in NULL:
        yield None
    if value.strip().startswith("["):  # a list, even if text is accepted too
        yield spelled(value)
    yield value
    yield spelled(value)


def _as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
    elif get_origin(kind) is list and isinstance(value, list | tuple):
        return [convert(get_args(kind)[0], item) for item in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is bool and isinstance(value, str) and value.lower() in SWITCH:
        return SWITCH[value.lower()]
    if kind is Path and isinstance(value, str | Path):
        return expanded(value)
    if kind in (bool, str, NoneType) and type(value) is kind:
        return value
    raise ValueError


def expected(kind: Any) -> str:
    """What users call a value of this type."""
    return f"a table of options such as {fields(kind)[0].name}" if is_dataclass(kind) else described(kind)


def plain(value: Any) -> Any:
    """The value with paths as text and tuples as lists, at any depth, as YAML, JSON and servers store it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
