"""What a training begins from: a new folder, or the checkpoint of a run that was interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import Interrupted, UserError, one_line, say, warn
from common.text import command, printable, quoted
from config.command_line import Invocation
from config.config import Config, flatten
from storage.checkpoint import RESUMABLE, load_checkpoint, previous, require_like
from storage.folder import INCIDENTAL, RunFolder

# What a resumed run may change: the rest would make it another experiment.
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
    """Where a training begins.

    name: of a new run. resumed: the folder of a run to go on with, None for a new one. checkpoint: the one that it
    goes on from, None where there is none.
    """

    config: Config
    name: str
    resumed: RunFolder | None = None
    checkpoint: dict[str, Any] | None = None

    @property
    def finished(self) -> str:
        """Where the run has trained and scored all that it was asked for, what to do about it in words; else empty."""
        if self.checkpoint is None or not finished(self.resumed, self.config, self.checkpoint):
            return ""
        path, epoch = self.resumed.path, self.checkpoint["epoch"]
        again = command("evaluate.py", path)
        return f"{printable(path)} is finished: raise --train.epochs above {epoch}, or {again}"

    @contextmanager
    def claimed(self) -> Iterator[RunFolder]:
        """The folder of the run, made where it is a new one, and held for this process alone.

        Raises UserError and EnvironmentFault, as `RunFolder.create` and `RunFolder.claimed`.
        """
        run = self.resumed or RunFolder.create(self.config.run_dir, self.name)
        with run.claimed():
            try:
                yield run
            except Interrupted:
                if run.last.exists():
                    say(f"{command('train.py', '--resume', run.path)} goes on from the last checkpoint")
                raise


def start_of(invocation: Invocation) -> Start:
    """Where the run that was asked for begins; nothing is written, and a folder that is in use or taken is told.

    Raises UserError, as `load_resumable` and where the folder serves another process or holds a run.
    """
    config = invocation.config
    if invocation.resume is None:
        if config.run_dir is not None:
            RunFolder(config.run_dir).refuse_busy()
            RunFolder(config.run_dir).refuse_run()
        return Start(config, invocation.name)
    run = RunFolder(invocation.resume)
    run.refuse_busy()
    return Start(config, invocation.name, run, load_resumable(run, config))


def load_resumable(run: RunFolder, config: Config) -> dict[str, Any] | None:
    """The last checkpoint of a run, or None where it was killed before it had one.

    Raises UserError where the configuration is no longer the run's own, or no checkpoint can be read.
    """
    if not run.last.exists() and not previous(run.last).exists():
        say(f"{run.path} was ended before its first checkpoint: it starts anew")
        return None
    checkpoint = load_checkpoint(run.last)
    require_like(checkpoint, RESUMABLE, run.last)
    if checkpoint.get("progress") is not None:
        require_like(checkpoint, {"progress": {"batches": int}}, run.last)
    if config.train.epochs < checkpoint["epoch"]:
        raise UserError(
            f"--resume {quoted(run.path)} cannot stop at epoch {config.train.epochs}, it has come to epoch "
            f"{checkpoint['epoch']}: set --train.epochs to {checkpoint['epoch']} or more, or start a new run"
        )
    # A run of a version that had no such option did what is its default.
    before = flatten(Config().to_dict()) | flatten(checkpoint["config"])
    now = flatten(config.to_dict())
    for key, value in now.items():
        if key not in CHANGEABLE and repr(before.get(key)) != repr(value):
            raise UserError(
                f"--resume {quoted(run.path)} cannot change {key} from {one_line(repr(before.get(key)), 60)} to "
                f"{value!r}: leave it out, or start a new run"
            )
    if (threads := checkpoint.get("threads")) != torch.get_num_threads():
        warn(f"{run.path} used {threads} CPU threads, now {torch.get_num_threads()}: on a CPU rounding will differ")
    return checkpoint


def finished(run: RunFolder, config: Config, checkpoint: dict[str, Any]) -> bool:
    """Whether the run has trained and scored all that `config` asks for."""
    train, epoch = config.train, checkpoint["epoch"]
    waited = 0 < train.patience <= epoch - checkpoint["improved"]
    trained = checkpoint.get("progress") is None and (epoch >= train.epochs or waited)
    return trained and run.scored


def metrics_step(checkpoint: dict[str, Any] | None) -> int:
    """The step up to which metrics.jsonl belongs to the checkpoint: the end of its last whole epoch."""
    if checkpoint is None:
        return 0
    return checkpoint["step"] - (checkpoint["progress"]["batches"] if checkpoint.get("progress") else 0)


def best_kept(run: RunFolder, config: Config, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The best epoch to go on from, of which best.pt (or the one before it) holds the weights.

    A best.pt ahead of the checkpoint is of an epoch that is about to be repeated, and will be the best again when it
    is; unless the plan has changed, which makes it another epoch: then what best.pt holds counts.
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
