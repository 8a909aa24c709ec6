"""SPACE.yaml: the searched options and their possible values.

optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
router.top_k: [1, 2]
experts.sizes: [[[16], [32]], [[64], [64]]]
"""

import json
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from common.errors import UserError
from common.text import printable
from config.config import Config, unknown_option, wrong_type
from config.values import convert, option_types
from config.yaml_file import read_yaml

if TYPE_CHECKING:
    from optuna import Trial

KEYS = {"low", "high", "log"}
FIXED = (
    "run_dir",
    "tracking",
    "device",
    "plugins",
    "data.",
    "train.seed",
    "dense_twin",
    "twin_of",
    "parallel.",
)
"""Prefixes of options that are not part of a recipe, or that would change the validation images."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included. log: uniform on a logarithmic scale. whole: whole numbers."""

    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: "Trial", name: str) -> Any:
        """The value for the trial."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def plain(self) -> dict[str, Any]:
        """The form used in SPACE.yaml."""
        return {"low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Choice:
    """One of several values. Lists are stored as JSON text, because Optuna accepts only plain values."""

    values: tuple[Any, ...]

    def suggest(self, trial: "Trial", name: str) -> Any:
        """The value for the trial."""
        return self.decode(trial.suggest_categorical(name, [_encoded(value) for value in self.values]))

    def decode(self, kept: Any) -> Any:
        """The value for what Optuna stores."""
        return next(value for value in self.values if _encoded(value) == kept and type(_encoded(value)) is type(kept))

    def plain(self) -> list[Any]:
        """The form used in SPACE.yaml."""
        return [_encoded(value) for value in self.values]


Space = dict[str, Range | Choice]


def read_space(path: Path) -> Space:
    """The space in a file. Raises UserError if it has no options, an unknown option, or invalid values."""
    space: Space = {}
    for name, given in _flat(read_yaml(path, "--space")):
        place = f"{name} in {printable(path)}"
        kind = option_types(Config).get(name)
        if kind is None:
            raise unknown_option(place, name)
        if is_dataclass(kind):
            raise UserError(f"{place} is a section: name an option of it, such as {name}.{_first(kind)}")
        if name.startswith(FIXED):
            raise UserError(f"{place} cannot be searched: all trials use the same data, seed and devices")
        space[name] = _range(place, given, kind) if isinstance(given, dict) else _choice(place, given, kind)
    if not space:
        raise UserError(
            f"{printable(path)} names no option to search: add one, such as optim.lr: {{low: 1e-4, high: 1e-2}}"
        )
    return space


def suggest(trial: "Trial", space: Space) -> dict[str, Any]:
    """The options of a trial by name."""
    return {name: part.suggest(trial, name) for name, part in space.items()}


def decoded(kept: dict[str, Any], space: Space) -> dict[str, Any]:
    """The options of a trial as stored by Optuna."""
    return {name: part.decode(kept[name]) if isinstance(part, Choice) else kept[name] for name, part in space.items()}


def as_plain(space: Space) -> dict[str, Any]:
    """The space as plain values, for comparing two spaces."""
    return {name: part.plain() for name, part in sorted(space.items())}


def as_text(part: Range | Choice) -> str:
    """The values of an option as SPACE.yaml writes them, on one line."""
    return json.dumps(part.plain() if isinstance(part, Range) else list(part.values))


def _flat(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """Options by their full names: sections may be written as tables."""
    flat = []
    for name, value in table.items():
        inner = isinstance(value, dict) and value and not value.keys() & KEYS
        flat += [(f"{name}.{key}", item) for key, item in value.items()] if inner else [(str(name), value)]
    return flat


def _first(kind: type) -> str:
    return next(iter(kind.__dataclass_fields__))


def _range(place: str, given: dict[str, Any], kind: Any) -> Range:
    kinds = set(get_args(kind) or (kind,))
    if given.keys() - KEYS or not {"low", "high"} <= given.keys():
        raise UserError(f"{place} is {printable(given)}: give low and high, and log: true for a logarithmic scale")
    if not kinds & {int, float}:
        raise UserError(f"{place} is not a number, so low and high do not apply: give a list of its values")
    whole = float not in kinds
    try:
        low, high = (convert(int if whole else float, given[key]) for key in ("low", "high"))
        log = convert(bool, given.get("log", False))
    except ValueError as error:
        raise UserError(
            f"{place} is {printable(given)}: low and high must be {'whole ' * whole}numbers, and log true or false"
        ) from error
    if not low < high:
        raise UserError(f"{place} goes from {low} to {high}: low must be below high")
    if log and low <= 0:
        raise UserError(f"{place} starts at {low}: a logarithmic scale must start above 0")
    return Range(low, high, log, whole)


def _choice(place: str, given: Any, kind: Any) -> Choice:
    if not isinstance(given, list) or not given:
        raise UserError(f"{place} is {printable(given)}: give a list of values, or {{low: , high: }}")
    values = []
    for value in given:
        try:
            values.append(convert(kind, value))
        except (ValueError, RecursionError) as error:
            raise wrong_type(place, value, kind) from error
    if len({json.dumps(value, default=str) for value in values}) < len(values):
        raise UserError(f"{place} contains a value twice: give each value once")
    return Choice(tuple(str(value) if isinstance(value, Path) else value for value in values))


def _encoded(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
