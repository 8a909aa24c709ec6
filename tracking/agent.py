"""A run that an agent of ClearML executes: the values of its task decide, before anything is read."""

import os
from dataclasses import fields, replace
from typing import Any

from common.errors import EnvironmentFault, UserError
from config.command_line import Invocation, parse_command_line
from config.config import Config
from tracking.clearml_runs import get_task

TASK_ID = ("CLEARML_TASK_ID", "TRAINS_TASK_ID")
"""Variables by which an agent names the task that it executes."""


def obey_agent(invocation: Invocation) -> Invocation:
    """The invocation with the values of the task that an agent executes in place of its own; as it is without one.

    Data, backbone and folder are the task's too, whatever file and options its script was started with, and a new run
    is called after its data; one that is resumed stays in its folder. Raises UserError for a value that does not fit,
    and EnvironmentFault where the task cannot be read: to train with other values than those that were asked for helps
    nobody.
    """
    task_id = next((os.environ[name] for name in TASK_ID if os.environ.get(name)), None)
    if task_id is None or invocation.config.tracking not in ("auto", "clearml"):
        return invocation
    try:
        task = get_task(task_id)
    except UserError as error:
        raise EnvironmentFault(f"the values of ClearML task {task_id}, which is to run here: {error}") from error
    values = _texts(task.data.hyperparams or {})
    if invocation.resume is not None:
        values.pop("run_dir", None)
    obeyed = parse_command_line(invocation.words, values, f"ClearML task {task_id}")
    return obeyed if obeyed.resume is not None else replace(obeyed, name=obeyed.config.data.name)


def _texts(sections: dict[str, Any]) -> dict[str, str]:
    """What the task has for each option, as text: {"train.epochs": "3"}."""
    known = {item.name for item in fields(Config)}
    texts = {}
    for section, parameters in sections.items():
        for name, parameter in parameters.items():
            key = name if section == "General" else f"{section}.{name}"
            if key.split(".")[0] in known:  # not what others keep there
                texts[key] = parameter.value or ""  # which is how the SDK writes None
    return texts
