"""Tracking of a run: always RUN/metrics.jsonl, and ClearML online, offline or not at all.

    tracker = open_tracker("auto", run_dir, config, name="cifar100", tags=["moe"])
    tracker.scalars({"loss/train": 0.41, "expert_load/expert_0": 0.26}, step=400, epoch=1)
    tracker.close()

RUN/clearml.json lists the tasks and offline sessions of a run, so that an evaluation finds its parent task.
Tracking never stops training: the trainer writes a line of JSON and queues jobs for ClearML, whose calls may block for
hours when a server dies; one daemon thread runs them. A failure is reported once.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError, say
from common.text import command, printable
from storage.folder import RunFolder
from tracking.clearml_task import ClearMLTask, server_problem, show, upload, use_model
from tracking.lines import open_lines
from tracking.tasks import record_task, tasks_of

MODES = ("auto", "clearml", "offline", "none")


class Tracker:
    """Records the numbers, figures and files of a run; created by `open_tracker`.

    mode: "clearml", "offline" or "none", as resolved. task_id: ClearML's, or None; `open_tracker` accepts it again.
    resends: whether this tracker sends what an earlier task did not receive.
    No method raises, and only `close` waits. Files are read later: do not change them before `close`.
    """

    def __init__(self, lines: TextIO, clearml: ClearMLTask | None = None, run_dir: Path | None = None):
        self._lines, self._clearml, self._run_dir, self._closed = lines, clearml, run_dir, False
        self.mode: str = clearml.mode if clearml else "none"
        self.task_id: str | None = clearml.task.id if clearml else None
        self.resends = False

    def scalars(self, values: dict[str, float], step: int, epoch: int | None = None) -> None:
        """Write one line of JSON, and send one ClearML point per value; keys are "title/series".

        A value that is not finite is null in the file and left out of ClearML, which would show 0.0.
        """
        finite = {key: float(value) for key, value in values.items() if _is_finite(value)}
        try:
            record = {"step": step, "epoch": epoch} | {key: finite.get(key) for key in values}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except (OSError, ValueError) as error:  # ValueError: written after close()
            say(f"tracking: {self._lines.name} cannot be written ({error}); training continues")
        self._points(finite, step)

    def summary(self, values: dict[str, float]) -> None:
        """Final numbers for ClearML's table of runs; they are not written to the file."""
        for key, value in values.items():
            if _is_finite(value):
                self._log("report_single_value", key, float(value))

    def figure(self, title: str, series: str, path: Path) -> None:
        """A PNG file, shown under debug samples."""
        self._send(show, title, series, Path(path))

    def table(self, title: str, series: str, header: list[str], rows: list[list]) -> None:
        """A table of text and numbers, shown under plots; numbers that are not finite are left empty."""
        cells = [["" if isinstance(v, float) and not _is_finite(v) else v for v in row] for row in rows]
        self._log("report_table", title, series, iteration=0, table_plot=[list(header), *cells])

    def bars(self, title: str, series: str, labels: Sequence[str], values: dict[str, Sequence[float | None]]) -> None:
        """Grouped bars under plots: one group per label, one colour per key of `values`.

        A value that is None or not finite is a gap.
        """
        heights = [[_drawn(value) for value in row] for row in values.values()]
        self._log("report_histogram", title, series, heights, 0, labels=list(values), xlabels=list(labels))

    def matrix(
        self,
        title: str,
        series: str,
        values: Sequence[Sequence[float | None]],
        rows: tuple[str, Sequence[str]],
        columns: tuple[str, Sequence[str]],
    ) -> None:
        """A heat map under plots, first row on top; a value that is None or not finite is a gap.

        rows, columns: axis title, and the name of each.
        """
        self._log(
            "report_confusion_matrix",
            title,
            series,
            [[_drawn(value) for value in row] for row in values],
            0,
            xaxis=columns[0],
            yaxis=rows[0],
            xlabels=list(columns[1]),
            ylabels=list(rows[1]),
            yaxis_reversed=True,
        )

    def lines(self, title: str, curves: dict[str, Sequence[tuple[float, float]]], axes: tuple[str, str]) -> None:
        """Curves of (x, y) points in one plot; a point that is not finite is left out."""
        for series, points in curves.items():
            finite = [point for point in points if all(map(_is_finite, point))]
            if finite:
                self._log(
                    "report_scatter2d", title, series, finite, 0, xaxis=axes[0], yaxis=axes[1], mode="lines+markers"
                )

    def artifact(self, name: str, path: Path) -> None:
        """Upload a file unchanged."""
        self._send(upload, name, Path(path))

    def model(self, path: Path, name: str, class_names: Sequence[str]) -> None:
        """Upload weights as the task's output model, with the names of the classes as its labels."""
        self._send(upload, name, Path(path), list(class_names))

    def starts_from(self, task_id: str) -> None:
        """Name the output model of another task as this one's input model."""
        self._send(use_model, task_id)

    def close(self, failed: str | None = None) -> None:
        """Send the rest and mark the task as completed, or failed with a reason. Idempotent.

        Waits for uploads, but at most CLOSE_SECONDS for a server that has stopped answering.
        """
        if not self._closed and self._clearml:
            whole = self._clearml.close(failed)
            if self._run_dir:
                record_task(self._run_dir, self._clearml, whole)
            if self.mode == "clearml" and not whole:
                again = command("evaluate.py", self._run_dir or "RUN", "--tracking", "clearml")
                say(f"tracking: {again} sends everything again")
        self._closed = True
        self._lines.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(failed=None if kind is None else str(error) or kind.__name__)

    def _points(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            title, _, series = key.partition("/")
            self._log("report_scalar", title, series or title, value, step)

    def _resend(self, records: list[dict[str, Any]]) -> None:
        """Send the lines that are already in the file: the task may lack some, or be a new one."""
        for record in records:
            values = {key: value for key, value in record.items() if "/" in key and _is_finite(value)}
            self._points(values, record.get("step", 0))

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
    kind: str = "training",
    parent: str | None = None,
) -> Tracker:
    """Open RUN/metrics.jsonl and, by mode, a ClearML task; prints one line about both.

    mode: "clearml" (the configured server, or an error), "offline" (a session to import later), "none",
    or "auto": the server if one is configured and answers, else offline, else none. config: nested dicts,
    shown as hyperparameters, one section per top-level key. task_id: continue this task, if the server has it.
    resume_step: drop the lines of metrics.jsonl after this step, and send the others again. ClearML sets its own seeds
    for random, numpy and torch: set yours after this call. kind: ClearML's task type. parent: id of its parent
    task on the server.

    Raises UserError (unknown mode, no server configured, login refused) and its subclass EnvironmentFault (no
    answer from the server, clearml or the file cannot be used). Mode "auto" raises only for the file.
    """
    if mode not in MODES:
        raise UserError(f"tracking mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    lines, before = open_lines(Path(run_dir) / "metrics.jsonl", resume_step)
    attempts = {"auto": ("clearml", "offline"), "none": ()}.get(mode, (mode,))
    try:
        clearml, reasons = _first_task(attempts, mode == "auto", config, name, list(tags), task_id, kind, parent)
    except UserError:
        lines.close()
        raise
    tracker = Tracker(lines, clearml, Path(run_dir))
    where = {"clearml": "ClearML and ", "offline": "ClearML offline and ", "none": ""}[tracker.mode]
    print(f"tracking: {where}{printable(lines.name)}" + "".join(f" ({reason})" for reason in dict.fromkeys(reasons)))
    if clearml:
        record_task(Path(run_dir), clearml, whole=False)
    if resume_step is not None:
        tracker._resend(before)
    return tracker


def require_server(mode: str) -> None:
    """Raise UserError or EnvironmentFault if this mode needs a server that is not configured or does not answer."""
    if mode == "clearml" and (problem := server_problem()):
        raise problem


def silent_tracker() -> Tracker:
    """A tracker that writes nothing, for a process whose numbers are written by another process."""
    return Tracker(open(os.devnull, "w", encoding="utf-8"))


def open_evaluation(mode: str, run_dir: Path, config: dict, *, name: str, tags: Sequence[str] = ()) -> Tracker:
    """A tracker for a later evaluation of the run in `run_dir`: a separate child task of the training task.

    mode: "clearml" (the configured server, or an error), "none", or "auto": the server of the training's task, if it
    has one and it answers. The parent is the run's last task on a server, if any; if that task is incomplete, the
    numbers of metrics.jsonl are sent too. Writes nothing to metrics.jsonl. Raises as `open_tracker`.
    """
    if mode not in ("auto", "clearml", "none"):
        raise UserError(f"tracking mode {mode!r} is not possible here: choose auto, clearml or none")
    online = [task for task in tasks_of(run_dir) if task["mode"] == "clearml"]
    clearml, reasons = None, []
    if mode == "clearml" or (mode == "auto" and online):
        parent = online[-1]["task_id"] if online else None
        clearml, reasons = _first_task(("clearml",), mode == "auto", config, name, list(tags), None, "testing", parent)
    if clearml or reasons:
        print("tracking: " + ("ClearML" if clearml else f"none ({reasons[0]})"))
    tracker = Tracker(open(os.devnull, "w", encoding="utf-8"), clearml)  # noqa: SIM115 - the tracker closes it
    if clearml and not (online and online[-1].get("whole")):
        tracker.resends = True
        tracker._resend(RunFolder(Path(run_dir)).history())
    return tracker


def _first_task(attempts: Sequence[str], tolerant: bool, *task: Any) -> tuple[ClearMLTask | None, list[str]]:
    """The task in the first mode that works, and why the earlier modes failed; None if `tolerant`, else it raises."""
    reasons = []
    for attempt in attempts:
        try:
            return ClearMLTask(attempt, *task), reasons
        except UserError as error:
            if not tolerant:
                raise
            reasons.append(str(error))
    return None, reasons


def _drawn(value: float | None) -> float | None:
    """The value, or None (a gap in a plot) if it is not finite."""
    return float(value) if _is_finite(value) else None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
