"""The result of compress.py for a run: its figures before and after, and the fate of each expert."""

import json
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.files import write_json
from evaluation.run_cost import si
from storage.folder import RunFolder

FIGURES = {
    "file_bytes": "model file",
    "memory_bytes": "trained weights in memory",
    "expert_bytes": "weights of the routed experts",
    "total_parameters": "parameters, with the backbone",
    "trained_parameters": "parameters, trained",
    "active_parameters": "parameters, active",
    "flops": "FLOPs per image",
    "latency_1": "latency of 1 image",
    "latency_256": "latency of 256 images",
    "macro_f1_validation": "macro-F1, validation",
    "macro_f1_test": "macro-F1, test",
}
"""The compared figures, in words."""
LEGEND = (
    "Bytes: of all trained weights, without the frozen backbone. Active parameters and FLOPs: mean over the validation "
    "images; FLOPs include the backbone, and a multiply-add counts as two. Latency: from images to predictions, with "
    "the backbone, not compiled. Test macro-F1 before: the score of the original run."
)
EXPERT_LEGEND = (
    "Load: share of the validation assignments before compression. Error: root mean square error of the expert's "
    "outputs when quantised, relative to their root mean square. Points lost: validation macro-F1 lost when only this "
    "expert is quantised. Experts kept in float16 show these figures for the format that they were protected from."
)
EXPERT_HEADER = ["expert", "load", "what was done", "error", "points lost"]


def read_compression(run: RunFolder) -> dict[str, Any]:
    """The content of compression.json; empty if the run is not from compress.py. Raises UserError if it is corrupt."""
    if not run.compression.is_file():
        return {}
    try:
        found = json.loads(run.compression.read_text(encoding="utf-8"))
        assert set(FIGURES) <= found["before"].keys() and set(FIGURES) <= found["after"].keys()
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{run.compression} was not written by compress.py: delete it to continue without it"
        ) from error


def with_test_score(run: RunFolder, macro_f1: float) -> dict[str, Any]:
    """The content of compression.json, with the test score once it exists; empty if there is no such file."""
    found = read_compression(run)
    if found and found["after"]["macro_f1_test"] is None:
        found["after"]["macro_f1_test"] = macro_f1
        write_json(run.compression, found)
    return found


def figure_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each of FIGURES: name, before, after."""
    return [[what, *(shown(name, found[when][name]) for when in ("before", "after"))] for name, what in FIGURES.items()]


def expert_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row of EXPERT_HEADER for each expert of the original run."""
    return [
        [
            row["expert"],
            "–" if row["load"] is None else f"{100 * row['load']:.1f} %",
            ", ".join(row["done"]) or "kept",
            "–" if row.get("error") is None else f"{100 * row['error']:.2f} %",
            "–" if row.get("points_lost") is None else f"{row['points_lost'] + 0.0:+.2f}",
        ]
        for row in found["experts"]
    ]


def shown(name: str, value: float | None) -> str:
    """A value of FIGURES, formatted."""
    if value is None:
        return "–"
    if name.startswith("macro_f1"):
        return f"{100 * value:.2f} %"
    if name.startswith("latency"):
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{value:,} bytes" if name.endswith("bytes") else si(value)


def text(found: dict[str, Any]) -> str:
    """Both tables, for a terminal."""
    figures = [["", "before", "after"], *figure_rows(found)]
    experts = [EXPERT_HEADER, *expert_rows(found)]
    return "\n".join([*_lines(figures), "", *_lines(experts)])


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
