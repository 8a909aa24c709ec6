"""The start of a training: a new folder, or the checkpoint of an interrupted run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.distributed import world
from common.errors import Interrupted, UserError, one_line, say, warn
from common.files import require_place
from common.text import command, printable, quoted
from config.command_line import Invocation
from config.config import Config, flatten
from storage.checkpoint import RESUMABLE, load_checkpoint, previous, require_like
from storage.folder import INCIDENTAL, RunFolder

# Options that a resumed run may change; any other would make it another experiment.
CHANGEABLE = INCIDENTAL | {
    "features.batch_size",
    "features.compile",
    "plugins",
    "experts.dispatch",
    "train.compile",
    "train.epochs",
    "train.graph",
    "train.patience",
    "train.recompute",
}


@dataclass(frozen=True)
class Start:
    """The start of a training.

    name: name of a new run. resumed: folder of the run to continue, None for a new run. checkpoint: the checkpoint to
    continue from, None if there is none.
    """

    config: Config
    name: str
    resumed: RunFolder | None = None
    checkpoint: dict[str, Any] | None = None

    @property
    def finished(self) -> str:
        """A message if the run is already trained and evaluated; else empty."""
        if self.checkpoint is None or not finished(self.resumed, self.config, self.checkpoint):
            return ""
        path, epoch = self.resumed.path, self.checkpoint["epoch"]
        again = command("evaluate.py", path)
        return f"{printable(path)} is finished: raise --train.epochs above {epoch}, or {again}"

    @contextmanager
    def claimed(self) -> Iterator[RunFolder]:
        """The folder of the run, created for a new run and locked for this process.

        Of several processes rank 0 creates and locks it.

        Raises UserError and EnvironmentFault, as `RunFolder.create` and `RunFolder.claimed`.
        """
        run = self.resumed
        if run is None:
            run = world().broadcast(RunFolder.create(self.config.run_dir, self.name) if world().first else None)
        with run.claimed() if world().first else nullcontext():
            try:
                yield run
            except Interrupted:
                if run.last.exists():
                    say(f"{command('train.py', '--resume', run.path)} continues from the last checkpoint")
                raise


def start_of(invocation: Invocation) -> Start:
    """The start of the requested run; nothing is written.

    Raises UserError as `load_resumable` does, if the folder is in use or already holds a run, and for a new run of
    quantised experts; EnvironmentFault if the folder cannot be created.
    """
    config = invocation.config
    if invocation.resume is None:
        if config.experts.quantised and config.init is not None:
            raise UserError(
                f"--init {quoted(config.init)} stores its experts in fewer bits: start from the run it was made from"
            )
        if config.experts.quantised:
            raise UserError(
                "experts.weights and experts.head_weights are set by compress.py --quantise: train in float32, "
                "then compress the run"
            )
        if world().first:
            require_place((config.run_dir or Path("runs") / invocation.name) / "checkpoints", "the run folder")
        if config.run_dir is not None:
            RunFolder(config.run_dir).require_not_busy()
            RunFolder(config.run_dir).require_no_run()
        return Start(config, invocation.name)
    run = RunFolder(invocation.resume)
    run.require_not_busy()
    return Start(config, invocation.name, run, load_resumable(run, config))


def load_resumable(run: RunFolder, config: Config) -> dict[str, Any] | None:
    """The last checkpoint of a run, or None if it has none yet.

    Raises UserError if the configuration was changed, or no checkpoint can be read.
    """
    if not run.last.exists() and not previous(run.last).exists():
        say(f"{run.path} was interrupted before its first checkpoint: it starts from the beginning")
        return None
    checkpoint = load_checkpoint(run.last)
    require_like(checkpoint, RESUMABLE, run.last)
    if checkpoint.get("progress") is not None:
        require_like(checkpoint, {"progress": {"batches": int}}, run.last)
    if config.train.epochs < checkpoint["epoch"]:
        raise UserError(
            f"--resume {quoted(run.path)} cannot stop at epoch {config.train.epochs}, because it has reached epoch "
            f"{checkpoint['epoch']}: set --train.epochs to {checkpoint['epoch']} or more, or start a new run"
        )
    # A run of a version without this option used the present default.
    before = flatten(Config().to_dict()) | flatten(checkpoint["config"])
    now = flatten(config.to_dict())
    for key, value in now.items():
        if key not in CHANGEABLE and repr(before.get(key)) != repr(value):
            raise UserError(
                f"--resume {quoted(run.path)} cannot change {key} from {one_line(repr(before.get(key)), 60)} to "
                f"{value!r}: leave it out, or start a new run"
            )
    if (threads := checkpoint.get("threads")) != torch.get_num_threads():
        warn(
            f"{run.path} used {threads} CPU threads, now there are {torch.get_num_threads()}: results on a "
            "CPU may differ by rounding"
        )
    return checkpoint


def finished(run: RunFolder, config: Config, checkpoint: dict[str, Any]) -> bool:
    """Whether the run has trained all epochs of `config` and was evaluated."""
    train, epoch = config.train, checkpoint["epoch"]
    waited = 0 < train.patience <= epoch - checkpoint["improved"]
    trained = checkpoint.get("progress") is None and (epoch >= train.epochs or waited)
    return trained and run.scored


def metrics_step(checkpoint: dict[str, Any] | None) -> int:
    """The last step of metrics.jsonl that belongs to the checkpoint: the end of its last complete epoch."""
    if checkpoint is None:
        return 0
    return checkpoint["step"] - (checkpoint["progress"]["batches"] if checkpoint.get("progress") else 0)


def best_kept(run: RunFolder, config: Config, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The best epoch so far, whose weights are in best.pt (or the previous one).

    If best.pt is newer than the checkpoint, its epoch will be repeated and will be the best again, unless the
    configuration has changed; then best.pt counts.
    """
    best = checkpoint["best"]
    if best["epoch"] == 0:
        return best
    kept = load_checkpoint(run.best)
    require_like(kept, {"macro_f1": float}, run.best)
    same_plan = flatten(checkpoint["config"]).get("train.epochs") == config.train.epochs
    if kept["epoch"] > best["epoch"] and same_plan:
        return best
    return {"epoch": kept["epoch"], "macro_f1": kept["macro_f1"]}
