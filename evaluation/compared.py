"""A run in a comparison, from its folder or from a ClearML server."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from common.errors import UserError, one_line, warn
from common.paths import absolute, expanded
from common.text import command, printable
from config.config import flatten
from evaluation.run_cost import NAMES
from evaluation.run_state import run_state
from evaluation.stale import why_stale
from storage.folder import RunFolder

SCORES = {  # keys of metrics.json -> the name of the figure, and whether it is shown in percent
    "macro_f1": ("macro-F1", True),
    "accuracy": ("accuracy", True),
    "superclass_accuracy": ("superclass accuracy", True),
    "loss": ("cross-entropy", False),
    "expected_calibration_error": ("calibration error", True),
    "entropy": ("balance", False),
    "cv": ("CV of the load", False),
    "specialisation.normalised": ("specialisation", False),
    "specialisation.z_score": ("specialisation, z", False),
    "gate.entropy_mean": ("gate entropy", False),
    "gate.boundary_share": ("near the boundary", True),
    "images": ("test images", False),
}
ROUTING_SCORES = ("entropy", "cv", "specialisation.normalised", "specialisation.z_score", "gate.entropy_mean")
"""Scores of the routing, which mean nothing for a single expert, such as that of a dense twin."""
FIGURES = [*SCORES, *(f"cost.{name}" for name in NAMES)]


@dataclass(frozen=True)
class Compared:
    """One run: name, source, flat configuration and final scores.

    load_E: share of the assignments of each expert. state: the text of `run_state`.
    """

    name: str
    source: str
    config: dict[str, Any]
    figures: dict[str, float]
    load_E: tuple[float, ...] = ()
    state: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for comparison.json."""
        return {**vars(self), "load_E": list(self.load_E)}


def load(source: str) -> Compared:
    """Load a run folder or a ClearML task. Raises UserError."""
    path = expanded(source)
    if path.is_dir():
        return _load_folder(RunFolder(path), source)
    if re.fullmatch("[0-9a-f]{32}", source):
        from tracking.clearml_runs import fetch_run  # here, because most comparisons need no server

        fetched = fetch_run(source)
        metrics = fetched["metrics"]
        parts = (flatten(fetched["config"]), _figures(metrics), _load(metrics), fetched.get("state", ""))
        return Compared(printable(fetched["name"]), source, *parts)
    raise UserError(f"{source} is neither the folder of a run nor the id of a ClearML task (32 hexadecimal digits)")


def _load_folder(run: RunFolder, source: str) -> Compared:
    file, history = run.results, run.history()
    if not file.is_file() and not (history and run.config.is_file()):
        raise UserError(f"{source} has no evaluation/metrics.json: run {command('evaluate.py', source)} first")
    if not run.config.is_file():
        raise UserError(f"{source} has no config.yaml: name a run folder of train.py")
    try:
        metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = one_line(error, 160)
        raise UserError(
            f"{source} has a corrupt config.yaml or evaluation/metrics.json ({reason}): evaluate it again"
        ) from error
    if not isinstance(metrics, dict) or not isinstance(config, dict):
        raise UserError(f"{source} is of another version: its config.yaml or evaluation/metrics.json is not a table")
    if reason := why_stale(metrics):
        warn(f"{source}: {reason}; {command('evaluate.py', source)} evaluates its current weights")
    if run.compression.is_file():
        config = config | {"compressed": True}  # not visible in the options
    flat, scored = flatten(config), flatten(metrics).get("cost.epochs")
    state = run_state(history, flat, scored if isinstance(scored, int) else None, reason)
    if not file.is_file():
        state = state or f"not scored: {command('evaluate.py', source)}"
    name = run.path.resolve().name
    return Compared(printable(name), str(absolute(source)), flat, _figures(metrics), _load(metrics), state)


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The available scores; older versions and tasks lack some, and those of the routing need two experts."""
    flat, alone = flatten(metrics), len(_load(metrics)) == 1
    keys = [key for key in FIGURES if not (alone and key in ROUTING_SCORES)]
    numbers = {key: flat[key] for key in keys if isinstance(flat.get(key), int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _load(metrics: dict[str, Any]) -> tuple[float, ...]:
    load_E = metrics.get("expert_load")
    good = isinstance(load_E, list) and all(isinstance(share, int | float) for share in load_E)
    return tuple(load_E) if good else ()
