"""The description of a trained run, exported from its best checkpoint if training has not finished."""

from collections.abc import Callable
from typing import Any

from common.errors import UserError, as_environment_fault
from common.text import command
from storage.checkpoint import load_checkpoint
from storage.export import export_model, read_description
from storage.folder import RunFolder


def describe(run: RunFolder, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The content of model.json; it is exported from the best checkpoint if training has not finished.

    Raises UserError for a path that is not a folder, EnvironmentFault if neither file is there or usable.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path} is not a folder: name a run folder of train.py")
    with as_environment_fault():
        return _described(run, say)


def _described(run: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    if run.best.is_file():
        best = load_checkpoint(run.best)
        kept = read_description(run).get("epoch") if run.model.is_file() else None
        # model.json may be newer if best.pt is corrupt and the previous checkpoint was read.
        if not isinstance(kept, int) or kept < best["epoch"]:
            say(f"{run.weights} is exported from {run.best}: the best epoch so far is {best['epoch']}")
            export_model(run, best)
    elif not run.model.is_file() and run.config.is_file():
        raise UserError(
            f"{run.path} has no checkpoint yet: wait for its first epoch, or if it was interrupted before that, "
            f"{command('train.py', '--resume', run.path)}"
        )
    elif not run.model.is_file():
        raise UserError(f"{run.path} has neither model.json nor checkpoints/best.pt: name a run folder of train.py")
    return read_description(run)
