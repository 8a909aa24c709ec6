"""Whether the scores of a run are final."""

from collections.abc import Sequence
from typing import Any


def run_state(history: Sequence[dict[str, Any]], config: dict[str, Any], scored: int | None, stale: str = "") -> str:
    """Why a run's scores are not final: training is unfinished, or was continued; empty if they are.

    history: the lines of metrics.jsonl, one per epoch. config: flat. scored: number of trained epochs when the test set
    was scored (None: unknown). stale: the reason why the results were marked as stale, if they were.
    """
    if not history:
        return f"stale: {stale[:1].lower()}{stale[1:]}" if stale else ""
    epochs, planned = history[-1]["epoch"], config.get("train.epochs")
    found = []
    if isinstance(planned, int) and epochs < planned and not _out_of_patience(history, config):
        found.append(f"unfinished: {epochs} of {planned} epochs")
    if stale:
        found.append(f"stale: {stale[:1].lower()}{stale[1:]}")
    elif scored is not None and epochs > scored:
        found.append(f"stale: scored after epoch {scored}, now at {epochs}")
    return "; ".join(found)


def _out_of_patience(history: Sequence[dict[str, Any]], config: dict[str, Any]) -> bool:
    """Whether early stopping has ended the training: patience epochs in a row without an improvement."""
    best, improved = -1.0, 0
    for line in history:
        if (line.get("macro_f1/validation") or 0.0) > best:
            best, improved = line.get("macro_f1/validation") or 0.0, line["epoch"]
    patience = config.get("train.patience")
    return isinstance(patience, int) and 0 < patience <= history[-1]["epoch"] - improved
