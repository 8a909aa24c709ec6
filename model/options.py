"""Options as dataclasses: values checked against field types, and fields that registered parts add."""

import difflib
import numbers
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .errors import InputError

ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", NoneType: "null"}
MANY = {int: "whole numbers", float: "numbers", str: "words"}
WIDEST = 1_000_000_000
"""Upper limit of layer widths and similar counts: more would not fit into any memory."""

GENERATED = ("__init__", "__repr__", "__eq__", "__match_args__", "__replace__", "__signature__")


@dataclass(frozen=True)
class Option:
    """An option that a registered part adds, such as a routing rule or an auxiliary loss.

    kind: its type annotation. check: a function that returns what is wrong with a value (None: nothing).
    """

    name: str
    kind: Any
    default: Any
    help: str
    check: Callable[[Any], str | None] | None = None


def count(value: int) -> str | None:
    """A check for counts."""
    return None if 1 <= value <= WIDEST else f"it must be from 1 to {WIDEST:,}"


def share(value: float) -> str | None:
    """A check for numbers from 0 to below 1."""
    return None if 0 <= value < 1 else "it must be at least 0 and below 1"


def add_option(config: type, option: Option) -> None:
    """Add a field to the dataclass `config`. Raises InputError if it has a different field of that name."""
    known = config.__dataclass_fields__.get(option.name)
    if known is None:
        set_field(config, option.name, option.kind, option.default, help=option.help, option=option)
    elif known.metadata.get("option") != option:
        raise InputError(f"option '{option.name}' already exists with another meaning: choose another name")


def set_field(config: type, name: str, kind: Any, default: Any = MISSING, **metadata: Any) -> None:
    """Define or redefine a field of the dataclass `config`: type, default and metadata."""
    for item in fields(config):  # for `dataclass` to read again
        setattr(config, item.name, item)
    if default is MISSING:
        default = config.__dataclass_fields__[name].default
    setattr(config, name, field(default=default, metadata=metadata))
    config.__annotations__ = {**config.__annotations__, name: kind}
    for generated in GENERATED:
        if generated in vars(config):
            delattr(config, generated)
    dataclass(config)


def check_options(config: Any, section: str) -> None:
    """Raise InputError for a field whose value has the wrong type or fails its check.

    section: the prefix of the names, as in router.kind.
    """
    for item in fields(config):
        value, option = getattr(config, item.name), item.metadata.get("option")
        if not is_a(value, item.type):
            raise InputError(
                f"{section}.{item.name} is {value!r}: give {described(item.type)}{suggestion(value, item.type)}"
            )
        if option is not None and option.check is not None and (reason := option.check(value)):
            raise InputError(f"{section}.{item.name} is {value}: {reason}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value matches a type annotation: a number, text, a path, a choice, a list, or null."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(value is choice or (value == choice and type(value) is type(choice)) for choice in get_args(kind))
    if origin in (Union, UnionType):
        return any(is_a(value, part) for part in get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(is_a(part, get_args(kind)[0]) for part in value)
    if kind in (int, float):
        accepted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, accepted) and not isinstance(value, bool)
    return isinstance(value, (str, PurePath) if kind is Path else kind)


def described(kind: Any, many: bool = False) -> str:
    """What users call a value of this type, or the entries of a list of them."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{'any' if many else 'one'} of {', '.join(map(str, inner))}"
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(described(part, many) for part in inner)
    if get_origin(kind) is list:
        return f"{'lists' if many else 'a list in brackets'} of {described(inner[0], many=True)}"
    return (MANY if many else ONE)[kind]


def suggestion(value: Any, kind: Any) -> str:
    """A suggestion of a similarly spelled choice; empty if there is none."""
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    close = difflib.get_close_matches(str(value), choices, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""
