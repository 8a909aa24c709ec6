"""Comparison of runs: differences between their configurations, and their scores."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import plots
from common.errors import UserError, warn
from common.files import require_place, write_json, write_text
from common.paths import expanded
from common.text import printable
from evaluation.compared import FIGURES, SCORES, Compared, load
from evaluation.figures import save_figure
from evaluation.run_cost import LEGEND as COST_LEGEND
from evaluation.run_cost import NAMES, shown
from evaluation.seeds import NOTE, differences_of, groups, seed_rows
from storage.folder import INCIDENTAL

WIDE = 6  # up to this many runs are columns of the printed table; more are rows
CELL = 40  # characters of a printed configuration value

MAIN = (  # printed where runs are rows
    *("macro-F1", "accuracy", "calibration error", "balance", "specialisation"),
    *(NAMES[name] for name in ("trained_parameters", "flops", "training_seconds")),
)
HIDDEN = INCIDENTAL | {"twin_of"}  # the options that it replaces have their own rows
LEGEND = (
    "Balance: entropy of the load, 1 is even. Specialisation: mutual information of class and expert over log E; "
    "z: standard deviations above shuffled labels. Near the boundary: images that almost went to another expert. "
) + COST_LEGEND


def compare(sources: Sequence[str], out: Path) -> str:
    """Compare runs, given as folders or ClearML task ids; write comparison.md, .json and .png to `out`.

    Returns the table for the terminal. Raises UserError if a source is neither, or was not evaluated, EnvironmentFault
    before that if `out` cannot be written.
    """
    if len(sources) < 2:
        raise UserError(f"--compare needs two runs or more, not {len(sources)}: evaluate.py --compare RUN RUN ...")
    require_place(out / "comparison.json", "--out")
    runs = _named([load(source) for source in sources])
    differing = differences(runs)
    rows, (found, left_out) = _rows(runs, differing), groups(runs)
    minus, unpaired = differences_of(found)
    value = {"differing": differing, "runs": [run.to_dict() for run in runs]}
    value |= {"seeds": [group.to_dict() for group in found], "differences": [each.to_dict() for each in minus]}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", value)
    together = seed_rows(found, minus)
    for line in [*(left_out if together else []), *unpaired]:
        warn(line)
    write_text(out / "comparison.md", _markdown(runs, rows, together))
    save_figure(_figure(runs), out / "comparison.png")
    return _text(runs, rows) + (f"\n\n{_aligned(together)}\n{NOTE}" if together else "")


def differences(runs: Sequence[Compared]) -> list[str]:
    """The configuration fields that differ between runs, in order of appearance."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    missing = object()
    return [
        key for key in keys if key not in HIDDEN and len({_shown(run.config.get(key, missing)) for run in runs}) > 1
    ]


def _named(runs: list[Compared]) -> list[Compared]:
    """The runs with unique names: folder or start of the id is added if two runs have the same name."""
    names = [run.name for run in runs]
    return [replace(run, name=_longer(run)) if names.count(run.name) > 1 else run for run in runs]


def _longer(run: Compared) -> str:
    path = expanded(run.source)
    return printable(path) if path.is_dir() else f"{run.name} ({run.source[:8]})"


def _rows(runs: Sequence[Compared], differing: list[str]) -> list[tuple[str, list[str]]]:
    """(name, one cell per run), scores first; scores that no run has are left out."""
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
    """The name of a score, and its values as printed."""
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
    """Header and lines: one column per run if there are few runs, otherwise one row per run."""
    grid = [["", *(run.name for run in runs)], *([what, *cells] for what, cells in rows)]
    return grid if len(runs) <= WIDE else [list(line) for line in zip(*grid, strict=True)]


def _text(runs: Sequence[Compared], rows: list[tuple[str, list[str]]]) -> str:
    if len(runs) > WIDE:
        left_out = {_cells(key, [])[0] for key in FIGURES} - set(MAIN)
        rows = [row for row in rows if row[0] not in left_out]
    rows = [(what, [cell if len(cell) <= CELL else cell[: CELL - 1] + "…" for cell in cells]) for what, cells in rows]
    return _aligned(_grid(runs, rows))


def _aligned(grid: list[list[str]]) -> str:
    """Lines of text; the first column is left-aligned and the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for line in grid:
        first, *cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in cells)]).rstrip())
    return "\n".join(lines)


def _markdown(runs: Sequence[Compared], rows: list[tuple[str, list[str]]], together: list[list[str]]) -> str:
    figure = "![Scores, balance and specialisation](comparison.png)"
    parts = [f"# Comparison of {len(runs)} runs", _table(_grid(runs, rows)), LEGEND, figure]
    parts[1:1] = [_table(together), NOTE] if together else []
    return "\n\n".join(parts) + "\n"


def _table(grid: list[list[str]]) -> str:
    header, *lines = [[_escape(cell) for cell in line] for line in grid]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


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
