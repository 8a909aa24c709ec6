"""RUN/clearml.json: the tasks and offline sessions of a run, so that an evaluation finds its parent task."""

import json
from pathlib import Path

from common.errors import UserError, say
from common.files import write_json
from tracking.clearml_task import ClearMLTask


def tasks_of(run_dir: Path) -> list[dict[str, str]]:
    """The entries of RUN/clearml.json, oldest first: mode, task_id, the task's page or the offline session's file, and
    whole: whether all data arrived.
    """
    try:
        listed = json.loads((Path(run_dir) / "clearml.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    tasks = [task for task in listed if isinstance(task, dict)] if isinstance(listed, list) else []
    return [task for task in tasks if {"mode", "task_id"} <= task.keys()]


def record_task(run_dir: Path, clearml: ClearMLTask, whole: bool) -> None:
    """Add the task to the file, or replace its entry. whole: all data has arrived on the server."""
    task = {"mode": clearml.mode, "task_id": clearml.task.id, **clearml.place(), "whole": whole}
    others = [other for other in tasks_of(run_dir) if other["task_id"] != task["task_id"]]
    try:
        write_json(run_dir / "clearml.json", [*others, task])
    except UserError as error:
        say(f"tracking: {error}; training continues")
