"""Cloned studies: a command that repeats a study, from the values of its ClearML task."""

from typing import Any

from common.errors import UserError
from common.files import require_place, write_text
from common.paths import absolute
from config.command_line import parse_command_line
from config.config import as_yaml
from tracking.agent import agent_task, option_texts, task_sections
from tuning.space import as_text
from tuning.worker import Plan


def study_sections(plan: Plan, jobs: int, queue: str | None) -> dict[str, dict[str, Any]]:
    """The sections of the study's task for `study_words`, without the storage URL, which may hold a password."""
    study = {"out": str(plan.folder.path), "trials": plan.trials, "jobs": jobs, "queue": queue, "pruning": plan.prune}
    return {"space": {name: as_text(part) for name, part in plan.space.items()}, "study": study}


def study_words(words: list[str]) -> list[str]:
    """The command line of tune.py; an agent passes none, so then it is made from the values of the agent's task.

    Writes the options and the space of the task to the folder of the study. Raises UserError for an invalid value, and
    EnvironmentFault if the task cannot be read or the folder cannot be written.
    """
    task_id = agent_task()
    if words or task_id is None:
        return words
    place, sections = f"ClearML task {task_id}", task_sections(task_id)
    study = {"out": "", "trials": "", "jobs": "", "queue": "", "pruning": ""} | sections.get("study", {})
    if not study["out"]:
        raise UserError(f"{place} names no folder for the study: set study/out")
    folder = absolute(study["out"])
    config = parse_command_line([], option_texts(sections), place).config
    options, space = (folder / f"{name}-{task_id}.yaml" for name in ("options", "space"))  # overwrites no other file
    require_place(options, f"study/out in {place}:")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(options, as_yaml(config))
    write_text(space, "".join(f"{name}: {text}\n" for name, text in sections.get("space", {}).items()))
    words = [f"--config={options}", f"--space={space}"]
    words += [f"--{name}={study[name]}" for name in ("out", "trials", "jobs", "queue") if study[name]]
    return words + ["--no_pruning"] * (study["pruning"].lower() == "false")
