"""Reading runs from a ClearML server, for a comparison."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, UserError
from config.config import Config
from config.values import convert, option_types
from config.yaml_file import spelled
from tracking.clearml_task import attempt, server_problem

WHOLE = ("completed", "closed", "published")
"""ClearML's names for a finished task."""


def get_task(task_id: str) -> Any:
    """The SDK's object for a task on the configured ClearML server.

    Raises UserError if no server is configured, the login fails, or the task does not exist, and EnvironmentFault if
    the server does not answer.
    """
    if problem := server_problem():
        raise problem
    from clearml import Task

    Task.set_offline(False)
    with quiet():
        task, error = attempt(Task.get_task, task_id=task_id)
    if task is None:
        raise UserError(f"the ClearML server has no task {task_id}: copy the id from the task's page") from error
    return task


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the SDK's log, which reports an unknown task or dataset in several lines."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fetch_run(task_id: str) -> dict[str, Any]:
    """Name, configuration and final scores of a task on the configured ClearML server.

    Returns {"name", "config" (nested as config.yaml), "metrics" (as evaluation/metrics.json if the task has that file,
    else the single values, such as {"accuracy": 0.7}), "state" (a reason not to trust the scores: the task is not
    completed; else empty)}. Raises as `get_task`.
    """
    task = get_task(task_id)
    with quiet():
        metrics, error = attempt(_metrics, task)
    if error is not None:
        raise EnvironmentFault(f"ClearML task {task_id} cannot be read ({type(error).__name__}: {error})") from error
    config, status = _config(task.data.hyperparams or {}), str(task.status)
    state = "" if status in WHOLE else f"unfinished: the task is {status.replace('_', ' ')}"
    return {"name": task.name, "config": config, "metrics": metrics, "state": state}


def _metrics(task: Any) -> dict[str, Any]:
    values = task.get_reported_single_values()
    single: dict[str, Any] = {name.removeprefix("test/"): value for name, value in values.items()}
    if "specialisation" in single:
        single["specialisation"] = {"normalised": single["specialisation"]}
    artifact = task.artifacts.get("evaluation")
    path, _ = attempt(artifact.get_local_copy, raise_on_error=True) if artifact else (None, None)
    whole, _ = attempt(lambda: json.loads(Path(path).read_text(encoding="utf-8"))) if path else (None, None)
    return {**single, **whole} if isinstance(whole, dict) else single


def _config(sections: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters (text by section and name) as nested plain values."""
    config: dict[str, Any] = {}
    for section, parameters in sections.items():
        for name, parameter in parameters.items():
            path = name.split("/") if section == "General" else [section, *name.split("/")]
            place = config
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = _plain(".".join(path), parameter.value or "", parameter.type)
    return config


def _plain(name: str, text: str, kind: str | None) -> Any:
    """The value of a text that the SDK wrote or a person edited: by the option's type, or else as YAML."""
    types = option_types(Config)
    if name in types:
        with suppress(ValueError):
            found = convert(types[name], text)
            return str(found) if isinstance(found, Path) else found
    return text if kind == "str" else spelled(text)
