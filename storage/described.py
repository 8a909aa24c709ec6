"""What a run that was trained says of itself, written first where training has not come to that."""

from collections.abc import Callable
from typing import Any

from common.errors import UserError, blaming_files
from common.text import command
from storage.checkpoint import load_checkpoint
from storage.export import export_model, read_description
from storage.folder import RunFolder


def describe(run: RunFolder, say: Callable[[str], None] = print) -> dict[str, Any]:
    """model.json, written first from the best checkpoint where training has not come to do that.

    Raises UserError for what is no folder, EnvironmentFault where it holds neither, or what it holds
    cannot be used.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path} is not a folder: name a run that train.py wrote")
    with blaming_files():
        return _described(run, say)


def _described(run: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    if run.best.is_file():
        best = load_checkpoint(run.best)
        kept = read_description(run).get("epoch") if run.model.is_file() else None
        if not isinstance(kept, int) or kept < best["epoch"]:  # later: best.pt is damaged, and the one before it read
            say(f"{run.weights} is written from {run.best}: the epoch kept so far is {best['epoch']}")
            export_model(run, best)
    elif not run.model.is_file() and run.config.is_file():
        raise UserError(
            f"{run.path} has no checkpoint yet: wait for its first epoch, or where it was interrupted before that, "
            f"{command('train.py', '--resume', run.path)}"
        )
    elif not run.model.is_file():
        raise UserError(f"{run.path} holds neither model.json nor checkpoints/best.pt: name a run that train.py wrote")
    return read_description(run)
