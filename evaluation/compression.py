"""What compress.py made of a run: its figures before and after, and what became of each expert."""

import json
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.files import write_json
from evaluation.run_cost import si
from storage.folder import RunFolder

FIGURES = {
    "file_bytes": "model file",
    "memory_bytes": "weights in memory",
    "expert_bytes": "weights of the routed experts",
    "total_parameters": "parameters, with the backbone",
    "trained_parameters": "parameters, trained",
    "active_parameters": "parameters, active",
    "flops": "FLOPs an image",
    "latency_1": "latency of 1 image",
    "latency_256": "latency of 256 images",
    "macro_f1_validation": "macro-F1, validation",
    "macro_f1_test": "macro-F1, test",
}
"""What is compared, in words."""
LEGEND = (
    "Bytes: of all that is trained, without the frozen backbone. Active parameters and FLOPs: of a mean validation "
    "image, FLOPs with the backbone, a multiply-add as two. Latency: from images to answers, backbone included, not "
    "compiled. Macro-F1 on the test images before: as the run was scored."
)
EXPERT_LEGEND = (
    "Load: share of the validation assignments, before. Error: of the outputs of the expert when it is quantised, root "
    "mean square over that of the outputs. Points lost: of validation macro-F1, where it alone is quantised. Experts "
    "in float16 have these figures of the format that they were spared."
)
EXPERT_HEADER = ["expert", "load", "what was done", "error", "points lost"]


def read_compression(run: RunFolder) -> dict[str, Any]:
    """What compression.json holds; empty where the run is not from compress.py. Raises UserError for a corrupt file."""
    if not run.compression.is_file():
        return {}
    try:
        found = json.loads(run.compression.read_text(encoding="utf-8"))
        assert set(FIGURES) <= found["before"].keys() and set(FIGURES) <= found["after"].keys()
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{run.compression} is not what compress.py writes: delete it to go without it") from error


def with_test_score(run: RunFolder, macro_f1: float) -> dict[str, Any]:
    """What compression.json holds, after the first score on the test set with that score; empty where there is none."""
    found = read_compression(run)
    if found and found["after"]["macro_f1_test"] is None:
        found["after"]["macro_f1_test"] = macro_f1
        write_json(run.compression, found)
    return found


def figure_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each of FIGURES: what, before, after."""
    return [[what, *(shown(name, found[when][name]) for when in ("before", "after"))] for name, what in FIGURES.items()]


def expert_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row of EXPERT_HEADER for each expert that the run had."""
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
    """A figure of FIGURES as people read it."""
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
