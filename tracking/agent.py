"""Runs executed by a ClearML agent: the values of the task override the configuration before anything is loaded."""

import os
from dataclasses import fields, replace
from typing import Any

from common.errors import EnvironmentFault, UserError
from config.command_line import Invocation, parse_command_line
from config.config import Config
from tracking.clearml_runs import get_task

TASK_ID = ("CLEARML_TASK_ID", "TRAINS_TASK_ID")
"""Environment variables in which an agent names its task."""


def apply_agent_values(invocation: Invocation) -> Invocation:
    """The invocation with the values of the agent's task; unchanged without an agent.

    Data, backbone and folder come from the task too, and a new run is named after its data; a resumed run stays in its
    folder. Raises UserError for an invalid value, and EnvironmentFault if the task cannot be read, because training
    with other values would be useless.
    """
    task_id = next((os.environ[name] for name in TASK_ID if os.environ.get(name)), None)
    if task_id is None or invocation.config.tracking not in ("auto", "clearml"):
        return invocation
    try:
        task = get_task(task_id)
    except UserError as error:
        raise EnvironmentFault(f"the values of ClearML task {task_id}, which this agent runs: {error}") from error
    values = _texts(task.data.hyperparams or {})
    if invocation.resume is not None:
        values.pop("run_dir", None)
    obeyed = parse_command_line(invocation.words, values, f"ClearML task {task_id}")
    return obeyed if obeyed.resume is not None else replace(obeyed, name=obeyed.config.data.name)


def _texts(sections: dict[str, Any]) -> dict[str, str]:
    """The task's options as text: {"train.epochs": "3"}."""
    known = {item.name for item in fields(Config)}
    texts = {}
    for section, parameters in sections.items():
        for name, parameter in parameters.items():
            key = name if section == "General" else f"{section}.{name}"
            if key.split(".")[0] in known:  # skip sections of other tools
                texts[key] = parameter.value or ""  # the SDK writes None so
    return texts
