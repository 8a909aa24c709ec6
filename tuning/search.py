"""Run a study: start processes that train its trials, and write the results as a table, a figure and files."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from assembly.replay import load_images
from common.errors import EnvironmentFault, UserError
from common.files import write_json
from common.signals import defer_signals
from common.text import printable
from config.config import Config
from model.outline import outline
from tracking.tasks import tasks_of
from tracking.tracker import Tracker, open_tracker, require_server
from tuning.clone import study_sections
from tuning.space import Space, decoded
from tuning.study import counted, ranked, release_dead
from tuning.worker import Plan, work, write_best

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SHOWN = 10  # trials in the table


def check_study(config: Config, space: Space) -> None:
    """Raise UserError or EnvironmentFault for what would fail every trial, before there is a study or a task.

    That is the data, which no space can change, and the backbone, unless options of it are searched.
    """
    require_server(config.tracking)
    if not any(name.startswith("backbone.") for name in space):
        outline(config.backbone)
    load_images(config)


def search(plan: Plan, jobs: int, queue: str | None = None) -> str:
    """Train the missing trials, write the results, and return the table.

    jobs: number of parallel trials, in processes of this machine or on the ClearML agents of a queue. Raises UserError
    if no trial was completed, and EnvironmentFault if a process ended unexpectedly or the server fails.
    """
    if queue is not None:
        import_module("tuning.agents")  # before there is a task, as ClearML's part of it wants
    config = plan.configure({}, "")
    study = plan.study(config.train.seed)
    online = [task["task_id"] for task in tasks_of(plan.folder.path) if task["mode"] == "clearml"]
    known = len(study.get_trials(deepcopy=False))
    values = config.to_dict() | study_sections(plan, jobs, queue)
    named = {"name": plan.folder.path.name, "tags": ["tuning", config.data.name], "kind": "optimizer"}
    again = {"task_id": online[-1] if online else None, "resume_step": known}
    with open_tracker(plan.tracking, plan.folder.path, values, **named, **again) as tracker:
        plan = replace(plan, tracking="none" if tracker.mode == "none" else plan.tracking)
        plan = replace(plan, parent=tracker.task_id if tracker.mode == "clearml" else None)
        if queue is None:
            _train_here(plan, study, tracker, jobs, config.train.seed + known)
        else:
            _train_on_agents(plan, study, tracker, queue, jobs)
        return _result(plan, study, tracker)


def _train_here(plan: Plan, study: "Study", tracker: Tracker, jobs: int, seed: int) -> None:
    """Train in processes of this machine. seed: of the search, from here on."""
    with _workers(plan, jobs, seed) as workers:
        reported = {trial.number for trial in counted(study)}
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
            with defer_signals:  # an interrupted transaction would lock the database for the workers
                _report(study, tracker, reported)
    _report(study, tracker, reported)
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if codes and _lacking(plan, study):
        raise EnvironmentFault(
            f"a process of the study ended with code {codes[0]}: run the same command again to continue"
        )


def _train_on_agents(plan: Plan, study: "Study", tracker: Tracker, queue: str, jobs: int) -> None:
    from tuning.agents import train_on_agents  # here, because it needs ClearML and Optuna

    with plan.folder.locked():
        release_dead(study, plan.folder)
    reported = {trial.number for trial in counted(study)}
    if lacking := _lacking(plan, study):
        train_on_agents(plan, study, queue, min(jobs, lacking), lacking, lambda: _report(study, tracker, reported))
    _report(study, tracker, reported)


@contextmanager
def _workers(plan: Plan, jobs: int, seed: int) -> Iterator[list[Any]]:
    """Processes that train trials. If the block ends early, they are stopped and their trials are released."""
    context = _context()
    count = min(jobs, _lacking(plan, plan.study(seed)))
    workers = [context.Process(target=work, args=(plan, seed + 1000 * index)) for index in range(count)]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for worker in workers:
            worker.join()


def _context() -> Any:
    """How to start workers: as forks of a process that has only done the imports, which take seconds.

    A fork of this process could not use a GPU. On a system without forks each worker repeats the imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning.worker", "optuna", "sklearn.model_selection"])
    return context


def _lacking(plan: Plan, study: "Study") -> int:
    """The number of trials that are still to be finished."""
    return max(0, plan.trials - sum(trial.state.is_finished() for trial in counted(study)))


def _report(study: "Study", tracker: Tracker, reported: set[int]) -> None:
    """Report the trials that were finished since the last call."""
    for trial in counted(study):
        if trial.number in reported or trial.value is None or trial.state.name != "COMPLETE":
            continue
        reported.add(trial.number)
        best = max(float(other.value or 0.0) for other in ranked(study))
        tracker.scalars({"tuning/macro_f1": float(trial.value), "tuning/best": best}, step=trial.number + 1)


def _result(plan: Plan, study: "Study", tracker: Tracker) -> str:
    from analysis import plots  # here, because importing matplotlib takes a second
    from evaluation.figures import save_figure

    folder, best, trials = plan.folder, ranked(study), counted(study)
    states = [trial.state.name for trial in trials]
    if not best:
        reasons = [reason for trial in trials if (reason := trial.user_attrs.get("reason"))]
        last = f": the last one {reasons[-1]}" if reasons else ""
        raise UserError(f"no trial of {printable(folder.path)} was completed{last}")
    write_best(plan, best[0])
    rows = [
        {"trial": trial.number, "state": trial.state.name.lower(), "macro_f1": _score(trial)}
        | {
            "epochs": len(trial.intermediate_values),
            "reason": trial.user_attrs.get("reason"),
            "task": trial.user_attrs.get("task"),
        }
        | decoded(trial.params, plan.space)
        for trial in trials
        if trial.params
    ]
    write_json(folder.path / "trials.json", rows)
    names = list(plan.space)
    curves = {trial.number: [v for _, v in sorted(trial.intermediate_values.items())] for trial in trials}
    panels = {name: [row[name] for row in rows] for name in names}
    logarithmic = [name for name in names if getattr(plan.space[name], "log", False)]
    figure = plots.search([row["macro_f1"] for row in rows], list(curves.values()), panels, logarithmic)
    save_figure(figure, folder.path / "trials.png")
    header = ["trial", "validation macro-F1", "epochs", *names]
    cells = [
        [f"{trial.number}", f"{100 * float(trial.value or 0.0):.2f} %", f"{len(trial.intermediate_values)}"]
        + [_cell(value) for value in decoded(trial.params, plan.space).values()]
        for trial in best[:SHOWN]
    ]
    tracker.table("trials", "best", header, [list(row) for row in cells])
    tracker.figure("tuning", "trials", folder.path / "trials.png")
    tracker.artifact("best configuration", folder.best)
    counts = f"{len(best)} completed, {states.count('PRUNED')} pruned, {states.count('FAIL')} failed"
    return f"{_aligned([header, *cells])}\n\n{len(trials)} trials: {counts}"


def _score(trial: "FrozenTrial") -> float | None:
    """Validation macro-F1 of a completed trial; Optuna also stores a value for pruned trials."""
    return trial.value if trial.state.name == "COMPLETE" else None


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
