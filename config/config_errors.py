"""What is wrong with a configuration, in one line of the user's own words: where, what was given, what is expected."""

import difflib
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from common.errors import UserError, one_line

ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", NoneType: "null"}
MANY = {int: "whole numbers", float: "numbers", str: "words"}
UNKNOWN = (
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
    r"[Uu]nrecognized arguments: (?:--)?(?P<name>[\w.]+)",
    r"(?:[Oo]ption|Key) '(?P<name>[\w.]+)'",
)


def option_types(config: type) -> dict[str, Any]:
    """The type of every option, "train.epochs", and of every section, "train", of the dataclass `config`."""
    types: dict[str, Any] = {}
    for item in fields(config):
        types[item.name] = item.type
        if is_dataclass(item.type):
            types |= {f"{item.name}.{inner.name}": inner.type for inner in fields(item.type)}
    return types


def expected(kind: Any, many: bool = False) -> str:
    """What a value of this type, or the entries of a list of them, are called by someone who writes them."""
    if is_dataclass(kind):
        return f"a table of options such as {fields(kind)[0].name}"
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{'any' if many else 'one'} of {', '.join(map(str, inner))}"
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(expected(part, many) for part in inner)
    if get_origin(kind) is list:
        return f"{'lists' if many else 'a list in brackets'} of {expected(inner[0], many=True)}"
    return (MANY if many else ONE)[kind]


def explain(
    error: Exception, types: dict[str, Any], source: str | None, given: Callable[[str], tuple[str, Any]]
) -> UserError:
    """The parser's error as a user's.

    types: those of `option_types`. source: the file that was read. given: the place and the value of an option, for
    the line: ("--train.epochs", "many").
    """
    message = one_line(error)
    if (found := re.search(r"nrecognized arguments: ([^-\s]\S*\.ya?ml)\b", message)) and Path(found[1]).is_file():
        return UserError(f"{found[1]} is a configuration file: write --config {found[1]}")
    for pattern in UNKNOWN:
        if found := re.search(pattern, message):
            name = ".".join(part for part in (found.groupdict().get("group"), found["name"]) if part)
            options = [key for key in types if not is_dataclass(types[key])]
            same_word = [key for key in options if key.split(".")[-1] == name.split(".")[-1]]
            close = same_word or difflib.get_close_matches(name, options, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists all options"
            return UserError(f"unknown option {name}: {hint}")
    if (found := re.match(r"argument --([\w.]+): expected one argument", message)) and found[1] in types:
        return UserError(f"--{found[1]} has no value: give {expected(types[found[1]])}")
    if (found := re.search(r'Parser key "([\w.]+)":', message)) and found[1] in types:
        return misfit(*given(found[1]), types[found[1]])
    if re.match(r"Unexpected config|Problems parsing config|'utf-8'|Unable to load", message):
        reason = message.split(": ", 1)[-1] if ": " in message else "it is empty"
        return UserError(f"{source} is not a YAML configuration: {reason}")
    return UserError(re.sub(r'Parser key "([\w.]+)"', r"\1", message))


def misfit(place: str, value: Any, kind: Any) -> UserError:
    """That a value is of another type than its option."""
    found = "" if value is None else f" is '{one_line(value, 80)}'"
    return UserError(f"{place}{found}: give {expected(kind)}")
