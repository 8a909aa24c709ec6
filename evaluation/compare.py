"""Comparison of runs: the differences of their configurations, and their scores."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis import plots
from common.errors import UserError, one_line, warn
from common.files import write_json, write_text
from common.paths import absolute, expanded
from common.text import command, printable
from config.config import flatten
from evaluation.figures import save_figure
from evaluation.run_cost import LEGEND as COST_LEGEND
from evaluation.run_cost import NAMES, shown
from evaluation.run_state import run_state
from evaluation.stale import why_stale
from storage.folder import INCIDENTAL, RunFolder

WIDE = 6  # up to this many runs are columns of the printed table; more are rows
CELL = 40  # characters of a printed configuration value

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
FIGURES = [*SCORES, *(f"cost.{name}" for name in NAMES)]
MAIN = (  # printed where runs are rows
    *("macro-F1", "accuracy", "calibration error", "balance", "specialisation"),
    *(NAMES[name] for name in ("trained_parameters", "flops", "training_seconds")),
)
LEGEND = (
    "Balance: entropy of the load, 1 is even. Specialisation: mutual information of class and expert over log E; "
    "z: standard deviations above shuffled labels. Near the boundary: images that nearly had another expert. "
) + COST_LEGEND


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


def compare(sources: Sequence[str], out: Path) -> str:
    """Compare runs, given as folders or ClearML task ids; write comparison.md, .json and .png to `out`.

    Returns the table for the terminal. Raises UserError if a source is neither, or was not evaluated.
    """
    if len(sources) < 2:
        raise UserError(f"--compare needs two runs or more, not {len(sources)}: evaluate.py --compare RUN RUN ...")
    runs = _named([load(source) for source in sources])
    differing = differences(runs)
    rows = _rows(runs, differing)
    value = {"differing": differing, "runs": [run.to_dict() for run in runs]}
    write_json(out / "comparison.json", value)
    markdown = _markdown(runs, rows)
    write_text(out / "comparison.md", markdown)
    save_figure(_figure(runs), out / "comparison.png")
    return _text(runs, rows)


def load(source: str) -> Compared:
    """Load an evaluated run folder or a ClearML task. Raises UserError."""
    path = expanded(source)
    if path.is_dir():
        return _load_folder(RunFolder(path), source)
    if re.fullmatch("[0-9a-f]{32}", source):
        from tracking.clearml_runs import fetch_run  # here, because most comparisons need no server

        fetched = fetch_run(source)
        metrics = fetched["metrics"]
        return Compared(
            printable(fetched["name"]), source, flatten(fetched["config"]), _figures(metrics), _load(metrics)
        )
    raise UserError(f"{source} is neither the folder of a run nor the id of a ClearML task (32 hexadecimal digits)")


def differences(runs: Sequence[Compared]) -> list[str]:
    """The configuration fields that differ between runs, in order of appearance."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    missing = object()
    return [
        key for key in keys if key not in INCIDENTAL and len({_shown(run.config.get(key, missing)) for run in runs}) > 1
    ]


def _load_folder(run: RunFolder, source: str) -> Compared:
    file = run.evaluation / "metrics.json"
    if not file.is_file():
        raise UserError(f"{source} has no evaluation/metrics.json: run {command('evaluate.py', source)} first")
    if not run.config.is_file():
        raise UserError(f"{source} has no config.yaml: name a run that train.py wrote")
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = one_line(error, 160)
        raise UserError(
            f"{source} has a corrupt config.yaml or evaluation/metrics.json ({reason}): evaluate it again"
        ) from error
    if not isinstance(metrics, dict) or not isinstance(config, dict):
        raise UserError(f"{source} is of another version: its config.yaml or evaluation/metrics.json is not a table")
    if reason := why_stale(metrics):
        warn(f"{source}: {reason}; {command('evaluate.py', source)} evaluates its present weights")
    flat, scored = flatten(config), flatten(metrics).get("cost.epochs")
    state = run_state(run.history(), flat, scored if isinstance(scored, int) else None, reason)
    name = run.path.resolve().name
    return Compared(printable(name), str(absolute(source)), flat, _figures(metrics), _load(metrics), state)


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The available scores; older versions and tasks lack some."""
    flat = flatten(metrics)
    numbers = {key: flat[key] for key in FIGURES if isinstance(flat.get(key), int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _load(metrics: dict[str, Any]) -> tuple[float, ...]:
    load_E = metrics.get("expert_load")
    good = isinstance(load_E, list) and all(isinstance(share, int | float) for share in load_E)
    return tuple(load_E) if good else ()


def _named(runs: list[Compared]) -> list[Compared]:
    """The runs with unique names: folder or start of the id is added where two runs have the same name."""
    names = [run.name for run in runs]
    return [replace(run, name=_longer(run)) if names.count(run.name) > 1 else run for run in runs]


def _longer(run: Compared) -> str:
    path = expanded(run.source)
    return printable(path) if path.is_dir() else f"{run.name} ({run.source[:8]})"


def _rows(runs: Sequence[Compared], differing: list[str]) -> list[tuple[str, list[str]]]:
    """(name, a cell for each run), scores first; scores that no run has are left out."""
    rows = []
    if any(run.state for run in runs):
        rows.append(("state", [run.state or "finished" for run in runs]))
    for key in FIGURES:
        values = [run.figures.get(key) for run in runs]
        if any(value is not None for value in values):
            name, cells = _cells(key, values)
            rows.append((name, cells))
    if any(run.load_E for run in runs):
        rows.append(("load of each expert", [_shares(run.load_E) for run in runs]))
    return rows + [(key, [_shown(run.config[key]) if key in run.config else "–" for run in runs]) for key in differing]


def _cells(key: str, values: Sequence[float | None]) -> tuple[str, list[str]]:
    """The name of a figure, and its values as they are printed."""
    if key in SCORES:
        name, as_percent = SCORES[key]
        return name, [_number(value, as_percent) for value in values]
    name = key.removeprefix("cost.")
    return NAMES[name], [shown(name, value) for value in values]


def _shares(load_E: Sequence[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in load_E) + " %" if load_E else "–"


def _number(value: float | None, as_percent: bool) -> str:
    if value is None:
        return "–"
    if as_percent:
        return f"{100 * value:.2f} %"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)


def _grid(runs: Sequence[Compared], rows: list[tuple[str, list[str]]]) -> list[list[str]]:
    """Header and lines: a column for each of few runs, or a row for each of many."""
    grid = [["", *(run.name for run in runs)], *([what, *cells] for what, cells in rows)]
    return grid if len(runs) <= WIDE else [list(line) for line in zip(*grid, strict=True)]


def _text(runs: Sequence[Compared], rows: list[tuple[str, list[str]]]) -> str:
    if len(runs) > WIDE:
        left_out = {_cells(key, [])[0] for key in FIGURES} - set(MAIN)
        rows = [row for row in rows if row[0] not in left_out]
    rows = [(what, [cell if len(cell) <= CELL else cell[: CELL - 1] + "…" for cell in cells]) for what, cells in rows]
    grid = _grid(runs, rows)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for line in grid:
        first, *cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in cells)]).rstrip())
    return "\n".join(lines)


def _markdown(runs: Sequence[Compared], rows: list[tuple[str, list[str]]]) -> str:
    header, *lines = [[_escape(cell) for cell in line] for line in _grid(runs, rows)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
    figure = "![Scores, balance and specialisation](comparison.png)"
    return f"# Comparison of {len(runs)} runs\n\n{table}\n\n{LEGEND}\n\n{figure}\n"


def _escape(cell: str) -> str:
    """Escape text for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(cell.split()))


def _figure(runs: Sequence[Compared]):
    """The best run by macro-F1 on top."""
    order = sorted(range(len(runs)), key=lambda index: -runs[index].figures.get("macro_f1", -1.0))
    ordered = [runs[index] for index in order]

    def column(key: str, factor: float = 1.0) -> np.ndarray:
        return np.array([factor * run.figures.get(key, math.nan) for run in ordered])

    panels = {
        "test score (%)": {"macro-F1": column("macro_f1", 100), "accuracy": column("accuracy", 100)},
        "balance: entropy of the load": {"balance": column("entropy")},
        "specialisation: mutual information\nof class and expert, of log E": {
            "specialisation": column("specialisation.normalised")
        },
        "calibration error (%)": {"calibration": column("expected_calibration_error", 100)},
    }
    known = {
        label: series
        for label, series in panels.items()
        if not all(np.isnan(values).all() for values in series.values())
    }
    names = [run.name if len(run.name) <= CELL else "…" + run.name[1 - CELL :] for run in ordered]
    marks = [f" ({run.state.split(':')[0]})" if run.state else "" for run in ordered]
    names = [name + mark for name, mark in zip(names, marks, strict=True)]
    return plots.comparison(names, known, from_zero=[*panels][1:])
