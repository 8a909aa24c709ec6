"""Queues of a ClearML server, and the draft of a task that its agents train clones of."""

from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, UserError, one_line, warn
from common.text import printable
from tracking.clearml_task import PROJECT, attempt, server_problem


def require_queue(name: str) -> None:
    """Raise UserError where no server is configured or it has no such queue, EnvironmentFault where none answers."""
    if problem := server_problem():
        raise problem
    from clearml import Task
    from clearml.backend_api.session.client import APIClient

    Task.set_offline(False)
    queues, error = attempt(lambda: sorted(queue.name for queue in APIClient().queues.get_all()))
    if queues is None:
        raise EnvironmentFault(f"the queues of the ClearML server cannot be read ({one_line(error, 160)})") from error
    if name not in queues:
        has = f"it has {', '.join(map(printable, queues))}" if queues else "it has none"
        raise UserError(
            f"the ClearML server has no queue {printable(name)}, {has}: name one that an agent uses, or create it"
        )


def draft_task(program: Path, config: dict[str, Any], name: str, tags: list[str]) -> str:
    """The id of a task that runs a program of this repository with this configuration, once it is enqueued.

    config: nested dicts, which become hyperparameters as those of a run are. Warns where agents could not fetch the
    program. Raises EnvironmentFault where the server does not take the task.
    """
    from clearml import Task

    task, error = attempt(
        Task.create,
        project_name=PROJECT,
        task_name=name,
        task_type="training",
        script=str(program),
        add_task_init_call=False,
    )
    if error is None:
        if not task.data.script.repository:
            warn(f"{printable(program.parent)} has no remote git repository, from which ClearML agents fetch a program")
        _, error = attempt(_describe, task, config, tags)
    if error is not None:
        raise EnvironmentFault(f"the ClearML server took no task to clone ({one_line(error, 160)})") from error
    return task.id


def parameter_names(options: list[str]) -> dict[str, str]:
    """What ClearML calls options: optim.lr is optim/lr, and one of no section General/init."""
    return {name: name.replace(".", "/", 1) if "." in name else f"General/{name}" for name in options}


def _describe(task: Any, config: dict[str, Any], tags: list[str]) -> None:
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    names = parameter_names(list(flat))
    task.set_parameters({names[key]: value for key, value in flat.items()})
    task.set_tags(tags)
