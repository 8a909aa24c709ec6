"""RunFolder: the files of one run, and how they are written so that none is ever half there."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, UserError
from common.locks import try_lock
from common.text import quoted

# Where a run lies, what it ran on and how often it was saved: not what it is.
INCIDENTAL = {
    "run_dir",
    "tracking",
    "device",
    "data.root",
    "data.download",
    "backbone.weights",
    "features.cache_dir",
    "train.save_every",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; made: whether this process has made the folder, None where it goes on with a run."""

    path: Path
    made: bool | None = None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model.json"

    @property
    def compression(self) -> Path:
        """What compress.py did, of a run that it made."""
        return self.path / "compression.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        return self.evaluation / "metrics.json"

    @property
    def scored(self) -> bool:
        """Whether there are results, and not those of weights that the run has gone on from (evaluation.stale)."""
        try:
            results = json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(results, dict) and "stale" not in results

    @property
    def figures(self) -> Path:
        return self.evaluation / "figures"

    @property
    def report(self) -> Path:
        return self.evaluation / "report.html"

    @classmethod
    def create(cls, run_dir: Path | None, name: str) -> "RunFolder":
        """A new run, in `run_dir` or a new runs/<name>-<time>, which no other process gets as well.

        Raises UserError where `run_dir` holds a run already, EnvironmentFault where it cannot be made.
        """
        try:
            path = run_dir or _new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
            cls(path).refuse_run()
            made = run_dir is None or not path.exists()
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(
                f"run folder {error.filename or run_dir} cannot be made: {error.strerror}; choose another --run_dir"
            ) from error
        return cls(path, made)

    def refuse_run(self) -> None:
        """Raise UserError where the folder holds a run already."""
        if any(self.last.parent.glob("*.pt")) or self.model.exists():
            raise UserError(
                f"{self.path} already holds a run: choose another --run_dir, or go on with it by --resume "
                f"{quoted(self.path)}"
            )

    def refuse_busy(self) -> None:
        """Raise UserError where another process has claimed the folder: a first look, which claims nothing."""
        with suppress(OSError), (self.path / ".lock").open("rb") as file:  # none: no one has
            if not try_lock(file, shared=True):
                raise _in_use(self.path)

    def require(self) -> None:
        """Raise EnvironmentFault where the folder has been removed, or its disk has gone."""
        if not self.metrics.is_file():
            kept = f"kept: {self.last}" if self.last.is_file() else "nothing of this run is kept there"
            raise EnvironmentFault(
                f"run folder {self.path} was removed, moved or is out of reach: {kept}; bring it back and --resume it, "
                "or start anew in another --run_dir"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this process alone; the hold ends with the process, however that ends.

        Clears what a killed process left unfinished; a folder in which nothing was kept is removed at the end.
        Raises UserError where another process holds it.
        """
        lock = self.path / ".lock"
        try:
            file = lock.open("wb")
        except OSError as error:
            raise EnvironmentFault(f"{lock} cannot be written: {error.strerror}; choose another --run_dir") from error
        with file:
            if not any(try_lock(file) or time.sleep(0.05) for _ in range(4)):  # another may be having its first look
                raise _in_use(self.path)
            if self.made is not None:
                self.metrics.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            for unfinished in self.path.rglob(".*.partial"):
                unfinished.unlink(missing_ok=True)
            try:
                yield
            finally:
                with suppress(OSError):
                    self._remove_if_empty(lock)

    def _remove_if_empty(self, lock: Path) -> None:
        """Remove what a run has written that ended before it had anything to keep, and no file of anyone else."""
        logged = self.metrics.exists() and self.metrics.stat().st_size
        if self.made is None or logged or any(self.last.parent.iterdir()):
            return
        for path in (self.config, self.metrics, lock):
            path.unlink(missing_ok=True)
        self.last.parent.rmdir()
        if self.made:
            self.path.rmdir()

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less those that are not what the tracker writes (a truncated one)."""
        lines = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    lines.append(json.loads(line))
        return [line for line in lines if _is_record(line)]


def _is_record(line: Any) -> bool:
    if not isinstance(line, dict) or not all(value is None or type(value) in (int, float) for value in line.values()):
        return False
    return all(type(line.get(key)) is int and line[key] > 0 for key in ("step", "epoch"))


def _new_folder(parent: Path, name: str) -> Path:
    """Make parent/name, or parent/name-2 and so on where another process was faster."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in count(1):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            path.mkdir()
            return path


def _in_use(folder: Path) -> UserError:
    return UserError(f"{folder} is in use by another process: wait for it, or choose another --run_dir")
