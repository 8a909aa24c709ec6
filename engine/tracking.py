"""Where the numbers of a run go: always RUN/metrics.jsonl, and ClearML online, offline or not at all.

    tracker = open_tracker("auto", run_dir, config, name="cifar100", tags=["moe"])
    tracker.scalars({"loss/train": 0.41, "expert_load/expert_0": 0.26}, step=400, epoch=1)
    tracker.close()

Tracking never decides whether training lives: the trainer writes a line of JSON and puts jobs on a queue; one
daemon thread speaks to ClearML, whose calls block for hours when a server dies. What fails is said once.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from engine.clearml_task import ClearMLTask, show, upload
from errors import EnvironmentFault, UserError

MODES = ("auto", "clearml", "offline", "none")


class Tracker:
    """One run's numbers, figures and files; made by `open_tracker`.

    mode: "clearml", "offline" or "none", as resolved. config: the given configuration, with the values that
    an agent of ClearML has overridden. task_id: of ClearML, or None; `open_tracker` takes it back.
    No method raises; none but `close` waits for anything. Files are read later: let them be until `close`.
    """

    def __init__(self, lines: TextIO, config: dict, clearml: "ClearMLTask | None" = None):
        self._lines, self._clearml, self._closed = lines, clearml, False
        self.mode: str = clearml.mode if clearml else "none"
        self.config: dict = clearml.config if clearml else config
        self.task_id: str | None = clearml.task.id if clearml else None

    def scalars(self, values: dict[str, float], step: int, epoch: int | None = None) -> None:
        """One line of JSON, and one ClearML point per value; keys are "title/series".

        A value that is not finite is null in the file and left out of ClearML, which would show 0.0.
        """
        finite = {key: float(value) for key, value in values.items() if _is_finite(value)}
        try:
            record = {"step": step, "epoch": epoch} | {key: finite.get(key) for key in values}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except (OSError, ValueError) as error:  # ValueError: written after close()
            print(f"tracking: {self._lines.name} cannot be written ({error}); going on", file=sys.stderr)
        for key, value in finite.items():
            title, _, series = key.partition("/")
            self._log("report_scalar", title, series or title, value, step)

    def summary(self, values: dict[str, float]) -> None:
        """Final numbers, one each, for ClearML's table of runs; they are not written to the file."""
        for key, value in values.items():
            if _is_finite(value):
                self._log("report_single_value", key, float(value))

    def figure(self, title: str, series: str, path: Path, step: int = 0) -> None:
        """A PNG file, shown among the debug samples."""
        self._send(show, title, series, Path(path), step)

    def table(self, title: str, series: str, header: list[str], rows: list[list], step: int = 0) -> None:
        """A table of text and numbers, shown among the plots; what is not finite is left empty."""
        cells = [["" if isinstance(v, float) and not _is_finite(v) else v for v in row] for row in rows]
        self._log("report_table", title, series, iteration=step, table_plot=[list(header), *cells])

    def artifact(self, name: str, path: Path) -> None:
        """A file to keep as it is."""
        self._send(upload, name, Path(path), False)

    def model(self, path: Path, name: str) -> None:
        """A file of weights: the task's output model; offline, where the SDK cannot do that, an artifact."""
        self._send(upload, name, Path(path), self.mode == "clearml")

    def close(self, failed: str | None = None) -> None:
        """Send what is left; mark the task completed, or failed for the reason given. Idempotent.

        Waits for uploads, but no longer than CLOSE_SECONDS once the server has stopped answering.
        """
        if not self._closed and self._clearml:
            self._clearml.close(failed)
        self._closed = True
        self._lines.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(failed=None if kind is None else str(error) or kind.__name__)

    def _log(self, report: str, *args: Any, **kwargs: Any) -> None:
        self._send(lambda task: getattr(task.get_logger(), report)(*args, **kwargs))

    def _send(self, job: Callable, *args: Any) -> None:
        if self._clearml and not self._closed:
            self._clearml.jobs.put((job, args))


def open_tracker(
    mode: str,
    run_dir: Path,
    config: dict,
    *,
    name: str,
    tags: Sequence[str] = (),
    task_id: str | None = None,
    resume_step: int | None = None,
    say: Callable[[str], None] = print,
) -> Tracker:
    """Open RUN/metrics.jsonl and, by mode, a ClearML task; `say` gets one line on where the numbers go.

    mode: "clearml" (the configured server, or an error), "offline" (a session, to be imported later), "none",
    or "auto": the server if one is configured and answers, else offline, else none. config: nested dicts,
    shown as hyperparameters, one section for each top-level key. task_id: go on with this task, if online.
    resume_step: drop the lines of metrics.jsonl after this step. ClearML sets the seeds of random, numpy and
    torch to a number of its own: seed after this call.

    Raises UserError (unknown mode, no server configured, login refused) and its subclass EnvironmentFault (no
    answer from the server, clearml or the file cannot be used). Mode "auto" raises only for the file.
    """
    if mode not in MODES:
        raise UserError(f"tracking mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    lines, clearml, reasons = _open_lines(Path(run_dir) / "metrics.jsonl", resume_step), None, []
    for attempt in {"auto": ("clearml", "offline"), "none": ()}.get(mode, (mode,)):
        try:
            clearml = ClearMLTask(attempt, config, name, list(tags), task_id)
            break
        except UserError as error:
            if mode != "auto":
                lines.close()
                raise
            reasons.append(str(error))
    tracker = Tracker(lines, config, clearml)
    where = {"clearml": "ClearML and ", "offline": "ClearML offline and ", "none": ""}[tracker.mode]
    say(f"tracking: {where}{lines.name}" + "".join(f" ({reason})" for reason in dict.fromkeys(reasons)))
    return tracker


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _open_lines(path: Path, last_step: int | None) -> TextIO:
    """The file, to append to, less its lines after last_step and a torn one. Raises EnvironmentFault."""

    def keep(line: bytes) -> bool:
        try:
            step = json.loads(line)["step"]
            return line.endswith(b"\n") and (last_step is None or step <= last_step)
        except (ValueError, KeyError, TypeError):
            return False

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if not all(map(keep, lines)):
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(b"".join(filter(keep, lines)))
            temporary.replace(path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}") from error
