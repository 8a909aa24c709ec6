"""RunFolder: the files of one run, and how they are written so that none is ever half there."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from errors import EnvironmentFault, UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

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
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def figures(self) -> Path:
        return self.evaluation / "figures"

    @property
    def report(self) -> Path:
        return self.evaluation / "report.html"

    @classmethod
    def create(cls, run_dir: Path | None, name: str) -> "RunFolder":
        """A new run, in `run_dir` or runs/<name>-<time>. Raises errors.UserError where one is there already."""
        path = run_dir or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        if any((path / "checkpoints").glob("*.pt")) or (path / "model.json").exists():
            raise UserError(
                f"{path} already holds a run: choose another --run_dir, or go on with it by --resume {path}"
            )
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        except OSError as error:
            raise EnvironmentFault(
                f"run folder {path} cannot be made: {error.strerror}; choose another --run_dir"
            ) from error
        return cls(path)

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less one that a killed run left torn."""
        lines = []
        if self.metrics.exists():
            for line in self.metrics.read_text().splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(line))
        return lines


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path), flush it to the disk, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors raise their own on a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{path} could not be written: {reason}; what was there is kept") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    )
