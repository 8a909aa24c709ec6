"""The text of --help: all options by section, with their values in the default configuration."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from common.plugins import HELP
from config.config import Config, flatten
from config.values import expected

USAGE = """usage: python train.py [--config FILE] [--section.option VALUE ...] [--seeds N] [--resume RUN]

Train a vision mixture of experts on a frozen ViT, then evaluate it on the test set.
"""
GENERAL = {
    "--help": "Show this help and exit.",
    "--config FILE": "YAML file with any of the options below (default: configs/cifar100.yaml). Options on the command "
    "line override the file; options that are in neither have their own defaults.",
    "--print_config": "Check the configuration, print it as YAML and exit.",
    "--resume RUN": "Continue an interrupted run in its folder.",
    "--seeds N": "Train N runs with consecutive seeds, starting from train.seed, each in its own folder; load the "
    "inputs once, and print mean, standard deviation and paired differences.",
    "--plugins FILE": HELP,
    "--debug": "Show the traceback of an error.",
}
EXAMPLES = """examples:
  python train.py --config configs/digits.yaml                        no download, half a minute on a CPU
  python train.py --router.kind switch --router.top_k 1 --train.epochs 20
  python train.py --config configs/folder.yaml --data.root PICTURES   your own images, PICTURES/train/CLASS/*
"""
INDENT = 29


def help_text(config: Config) -> str:
    """The text of --help. config: the default configuration, whose values are shown."""
    width = min(120, get_terminal_size().columns)
    values, bare = flatten(config.to_dict()), flatten(Config().to_dict())
    parts = [USAGE, "general:\n" + "".join(_entry(name, text, width) for name, text in GENERAL.items())]
    top = [item for item in fields(Config) if not is_dataclass(item.type) and item.name != "plugins"]
    for name, kind, items in [("", Config, top), *_sections()]:
        texts = field_texts(kind)
        lines = [f"{inspect.getdoc(kind)}\n"]
        for item in items:
            key = f"{name}{item.name}"
            facts = f"({expected(item.type)}; {_default(values[key], bare[key])})"
            lines.append(_entry(f"--{key}", f"{texts.get(item.name, '')} {facts}", width))
        parts.append("".join(lines))
    return "\n".join([*parts, EXAMPLES])


def _sections() -> Iterator[tuple[str, type, list[Field]]]:
    for item in fields(Config):
        if is_dataclass(item.type):
            yield f"{item.name}.", item.type, list(fields(item.type))


def field_texts(kind: type) -> dict[str, str]:
    """The documentation of each field of a dataclass: the string below it, or "help" in its metadata."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    texts = {}
    for line, below in pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[line.target.id] = " ".join(str(below.value.value).split())
    for item in fields(kind):  # the help texts of registered parts
        if about := item.metadata.get("help"):
            texts[item.name] = about() if callable(about) else about
    return texts


def _entry(name: str, text: str, width: int) -> str:
    start = f"  {name}  ".ljust(INDENT)
    wrapped = textwrap.wrap(text, max(40, width - INDENT), break_on_hyphens=False) or [""]
    first = [start + wrapped[0]] if len(start) == INDENT else [start.rstrip(), " " * INDENT + wrapped[0]]
    return "\n".join([*first, *(" " * INDENT + line for line in wrapped[1:])]) + "\n"


def _default(value: Any, bare: Any) -> str:
    """The value in the default configuration, and the option's own default if it differs."""
    here, there = _shown(value), _shown(bare)
    return f"default: {here}" + (f", or {there} if not in the file" if here != there else "")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text.replace(str(Path.home()), "~", 1) if text.startswith(str(Path.home())) else text
