"""Programs executed by a ClearML agent: the values of the task override all others before anything is loaded."""

import os
from dataclasses import fields, replace

from common.errors import EnvironmentFault, UserError
from config.command_line import Invocation, parse_command_line
from config.config import Config, flatten
from storage.folder import INCIDENTAL
from tracking.clearml_runs import get_task

Sections = dict[str, dict[str, str]]

TASK_ID = ("CLEARML_TASK_ID", "TRAINS_TASK_ID")
"""Environment variables in which an agent names its task."""
LOCATIONS = ("data.root", "backbone.weights", "features.cache_dir")
"""Options of evaluate.py that a task may change: where files are."""


def agent_task() -> str | None:
    """The id of the task that an agent executes in this process; None without an agent."""
    return next((os.environ[name] for name in TASK_ID if os.environ.get(name)), None)


def task_sections(task_id: str) -> Sections:
    """The hyperparameters of a task as text, by section and name. Raises EnvironmentFault if it cannot be read."""
    try:
        task = get_task(task_id)
    except UserError as error:
        raise EnvironmentFault(f"the values of ClearML task {task_id}, which this agent runs: {error}") from error
    sections = task.data.hyperparams or {}
    return {  # the SDK writes None as empty text
        section: {name: parameter.value or "" for name, parameter in parameters.items()}
        for section, parameters in sections.items()
    }


def apply_agent_values(invocation: Invocation) -> Invocation:
    """The invocation with the values of the agent's task; unchanged without an agent.

    Data, backbone and folder come from the task too, and a new run is named after its data; a resumed run stays in its
    folder. Raises UserError for an invalid value, and EnvironmentFault if the task cannot be read, because training
    with other values would be useless.
    """
    task_id = agent_task()
    if task_id is None or invocation.config.tracking not in ("auto", "clearml"):
        return invocation
    values = option_texts(task_sections(task_id))
    if invocation.resume is not None:
        values.pop("run_dir", None)
    obeyed = parse_command_line(invocation.words, values, f"ClearML task {task_id}")
    return obeyed if obeyed.resume is not None else replace(obeyed, name=obeyed.config.data.name)


def evaluation_words(words: list[str]) -> list[str]:
    """The command line of evaluate.py; an agent passes none, so then it is made from the values of the agent's task.

    Raises UserError if the task names no run on this machine, or if its values differ from those of the run, and
    EnvironmentFault if the task cannot be read.
    """
    task_id = agent_task()
    if words or task_id is None:
        return words
    place, texts = f"ClearML task {task_id}", option_texts(task_sections(task_id))
    run = texts.pop("run_dir", "")
    if not run:
        raise UserError(f"{place} names no run to evaluate: set its run_dir")
    own, given = (
        flatten(parse_command_line(["--resume", run], above, place).config.to_dict()) for above in ({}, texts)
    )
    if changed := next((name for name in own if own[name] != given[name] and name not in INCIDENTAL), None):
        raise UserError(
            f"{changed} in {place} is {given[changed]}, but the run has {own[changed]}: an evaluation cannot change "
            "it, so clone the training task instead"
        )
    options = [f"--{name}={given[name]}" for name in LOCATIONS if given[name] is not None]
    return [run, "--tracking=clearml", f"--device={given['device']}", *options]


def option_texts(sections: Sections) -> dict[str, str]:
    """The options of train.py in a task: {"train.epochs": "3"}."""
    known = {item.name for item in fields(Config)}
    texts = {}
    for section, parameters in sections.items():
        for name, text in parameters.items():
            key = name if section == "General" else f"{section}.{name}"
            if key.split(".")[0] in known:  # skip sections of other tools
                texts[key] = text
    return texts
