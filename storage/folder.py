"""RunFolder: the files of one run."""

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

# Options that do not change results: folder, device, tracking, how often checkpoints are written.
INCIDENTAL = {
    "run_dir",
    "tracking",
    "device",
    "data.root",
    "data.download",
    "backbone.weights",
    "features.cache_dir",
    "train.save_every",
    "parallel.experts",
    "parallel.placement",
    "parallel.timeout",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. made: whether this process created the folder; None for a resumed run."""

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
        """What compress.py did, in a run that it wrote."""
        return self.path / "compression.json"

    @property
    def teachers(self) -> Path:
        """Who teaches a student that compress.py --distil has in training, and was interrupted."""
        return self.path / "teachers.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        return self.evaluation / "metrics.json"

    @property
    def scored(self) -> bool:
        """Whether there are results, and they are not stale (evaluation.stale) because training continued."""
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
        """A new run in `run_dir`, or in a new folder runs/<name>-<time>, safe against other processes.

        Raises UserError if `run_dir` already holds a run, EnvironmentFault if it cannot be created.
        """
        try:
            path = run_dir or _new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
            cls(path).require_no_run()
            made = run_dir is None or not path.exists()
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(
                f"run folder {error.filename or run_dir} cannot be created: {error.strerror}; choose another --run_dir"
            ) from error
        return cls(path, made)

    def require_no_run(self) -> None:
        """Raise UserError if the folder already holds a run."""
        if any(self.last.parent.glob("*.pt")) or self.model.exists():
            raise UserError(
                f"{self.path} already holds a run: choose another --run_dir, or continue it with --resume "
                f"{quoted(self.path)}"
            )

    def require_not_busy(self) -> None:
        """Raise UserError if another process has claimed the folder; this claims nothing."""
        with suppress(OSError), (self.path / ".lock").open("rb") as file:  # no lock file: it is free
            if not try_lock(file, shared=True):
                raise _in_use(self.path)

    def require(self) -> None:
        """Raise EnvironmentFault if the folder was removed or its disk is missing."""
        if not self.metrics.is_file():
            kept = f"kept: {self.last}" if self.last.is_file() else "it had no checkpoint yet"
            raise EnvironmentFault(
                f"run folder {self.path} was removed, moved or is out of reach: {kept}; restore it and --resume it, "
                "or start a new run in another --run_dir"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder for this process; the lock ends with the process.

        Removes unfinished files of a killed process, and at the end a folder without results. Raises UserError if
        another process holds the lock.
        """
        lock = self.path / ".lock"
        try:
            file = lock.open("wb")
        except OSError as error:
            raise EnvironmentFault(f"{lock} cannot be written: {error.strerror}; choose another --run_dir") from error
        with file:
            if not any(
                try_lock(file) or time.sleep(0.05) for _ in range(4)
            ):  # another process may be checking the lock
                raise _in_use(self.path)
            if self.made is not None:
                self.metrics.unlink(missing_ok=True)  # a run that ended before its first checkpoint
            for unfinished in self.path.rglob(".*.partial"):
                unfinished.unlink(missing_ok=True)
            try:
                yield
            finally:
                with suppress(OSError):
                    self._remove_if_empty(lock)

    def _remove_if_empty(self, lock: Path) -> None:
        """Remove the files of a run that ended before its first checkpoint, and no others."""
        logged = self.metrics.exists() and self.metrics.stat().st_size
        if self.made is None or logged or any(self.last.parent.iterdir()):
            return
        for path in (self.config, self.metrics, lock):
            path.unlink(missing_ok=True)
        self.last.parent.rmdir()
        if self.made:
            self.path.rmdir()

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, except invalid ones (a truncated line)."""
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
    """Create parent/name, or parent/name-2 and so on if it exists."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in count(1):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            path.mkdir()
            return path


def _in_use(folder: Path) -> UserError:
    return UserError(f"{folder} is in use by another process: wait for it, or choose another --run_dir")
