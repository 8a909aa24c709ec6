"""Configuration files in YAML."""

import re
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, one_line
from common.text import printable

LARGEST = 1_000_000  # limit of bytes and of values in a file: a few lines of aliases can expand beyond the memory


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, and yes, off, 2026-01-01, 010 and 1:30 are text."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - the name is PyYAML's


_RESOLVED = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _RESOLVED.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def spelled(text: str) -> Any:
    """The text parsed as YAML, or the text itself if that fails."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The table in a file that `option` names. Raises UserError if there is none or the file is too large."""
    if not path.exists():
        raise UserError(f"{option} {printable(path)}: no such file; name a YAML file with options")
    try:
        values = _load(path)
    except RecursionError:
        reason = "it is nested too deeply"
    except OSError as error:
        reason = error.strerror
    except (yaml.YAMLError, ValueError) as error:
        reason = one_line(error)
    else:
        if isinstance(values, dict):
            return values
        reason = "it is empty" if values is None else "it is not a table of options such as train"
    raise UserError(f"{printable(path)} is not a YAML configuration: {reason}")


def _load(path: Path) -> Any:
    too_large = ValueError(f"it has more than {LARGEST:,} bytes or values")
    if path.stat().st_size > LARGEST:
        raise too_large
    loader = Loader(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > LARGEST:
            raise too_large
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values of a node, aliases expanded."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # a node that contains itself
        inner = node.value if isinstance(node.value, list) else ()
        parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
