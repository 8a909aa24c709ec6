"""Trials on ClearML agents: clones of one task in a queue, managed by ClearML's own optimiser."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import optuna
from clearml.automation import (
    DiscreteParameterRange,
    HyperParameterOptimizer,
    LogUniformParameterRange,
    UniformIntegerParameterRange,
    UniformParameterRange,
)
from clearml.automation.optuna.optuna import OptimizerOptuna, OptunaObjective

from common.errors import EnvironmentFault, UserError, one_line
from storage.folder import RunFolder
from tracking.clearml_runs import quiet
from tracking.clearml_task import CLOSE_SECONDS, attempt
from tracking.queues import draft_task, parameter_names
from tuning.space import Choice, Range, suggest
from tuning.study import release
from tuning.worker import PROGRAM, Plan, keep_best, trial_line

SCORE = ("macro_f1", "validation")
"""Title and series of the objective."""
POLL_SECONDS = 5.0


class TrialFailed(Exception):
    """A trial without a score; its reason is stored with it."""


def train_on_agents(plan: Plan, study: optuna.Study, queue: str, jobs: int, lacking: int, report: Callable) -> None:
    """Let agents train the missing trials, `jobs` in parallel.

    report: called repeatedly during the search. Raises EnvironmentFault if the server fails. A signal ends the tasks of
    unfinished trials, which are repeated when the study continues.
    """
    config = plan.configure({}, "")
    values = config.to_dict() | {"run_dir": None, "tracking": "clearml"}
    logging.getLogger("clearml.automation").setLevel(logging.WARNING)
    base = draft_task(PROGRAM, values, f"{plan.folder.path.name}-base", ["tuning", config.data.name])
    trials = _Trials(plan, study)
    with (plan.folder.path / "clearml.txt").open("a", encoding="utf-8") as output, redirect_stdout(output):
        optimizer = _optimizer(plan, trials, base, queue, jobs, lacking)
        optimizer.start()
        try:
            while not trials.done.wait(0.2):
                report()
        finally:
            trials.ending = True
            stopping = threading.Thread(target=attempt, args=(optimizer.stop,), daemon=True)
            stopping.start()
            stopping.join(CLOSE_SECONDS)
            trials.done.wait(CLOSE_SECONDS)
            trials.release()
    if trials.error is not None:
        reason = f"{type(trials.error).__name__}: {one_line(trials.error, 160)}"
        raise EnvironmentFault(f"ClearML ended the study ({reason}): run the same command again to continue")


def _optimizer(
    plan: Plan, trials: "_Trials", base: str, queue: str, jobs: int, lacking: int
) -> HyperParameterOptimizer:
    """ClearML's optimiser for the trials. base: id of the task that is cloned. Raises EnvironmentFault."""
    keep = plan.configure({}, "").train.keep
    with quiet():  # hides the message that the task to clone has no score
        optimizer, error = attempt(
            HyperParameterOptimizer,
            base_task_id=base,
            hyper_parameters=[_parameter(trials.names[name], part) for name, part in plan.space.items()],
            objective_metric_title=SCORE[0],
            objective_metric_series=SCORE[1],
            objective_metric_sign="max_global" if keep == "best" else "max",
            max_number_of_concurrent_tasks=jobs,
            optimizer_class=_Optimizer,
            execution_queue=queue,
            auto_connect_task=False,  # the study's task has its own configuration
            total_max_jobs=lacking,
            max_iteration_per_job=None,
            trials=trials,
        )
    if optimizer is None:
        raise EnvironmentFault(f"ClearML cannot start the study ({one_line(str(error), 160)})") from error
    optimizer.get_optimizer().set_job_naming_scheme(trials.name)
    return optimizer


class _Trials:
    """The trials of a study that `_Optimizer` runs."""

    def __init__(self, plan: Plan, study: optuna.Study):
        self.plan, self.study, self.output = plan, study, sys.stdout
        self.names = parameter_names(list(plan.space))
        self.jobs: dict[int, Any] = {}  # by thread, like the trial numbers
        self.numbers: dict[int, int] = {}
        self.running: dict[int, dict[str, Any]] = {}
        self.done, self.ending = threading.Event(), False
        self.error: Exception | None = None

    def run(self, objective: OptunaObjective, trial: optuna.Trial) -> float:
        """Run one trial; returns its validation macro-F1. Raises TrialFailed and optuna.TrialPruned."""
        began, plan = time.monotonic(), self.plan
        options = suggest(trial, plan.space)
        self.running[trial.number] = trial.params
        outcome: float | str = ""
        if not self.ending:
            run = RunFolder.create(plan.folder.trial(trial.number).path, "trial")
            with run.claimed():  # shows other processes that the trial is running
                outcome = self._outcome(objective, trial, options)
        if self.ending:
            if (job := self.jobs.get(threading.get_ident())) is not None:
                attempt(job.abort)
            self.study.stop()
            raise TrialFailed
        del self.running[trial.number]
        if isinstance(outcome, str):
            trial.set_user_attr("reason", outcome)
        print(trial_line(trial.number, options, outcome, time.monotonic() - began), file=self.output, flush=True)
        if isinstance(outcome, str):
            raise optuna.TrialPruned if outcome.startswith("pruned") else TrialFailed
        return outcome

    def _outcome(self, objective: OptunaObjective, trial: optuna.Trial, options: dict[str, Any]) -> float | str:
        try:
            config = self.plan.configure(options, f"trial {trial.number}")
        except UserError as error:
            return f"failed ({one_line(error, 200)})"
        watched, thread, pruned = _Watched(trial, self, config.train.epochs), threading.get_ident(), False
        self.jobs.pop(thread, None)
        self.numbers[thread] = trial.number
        try:
            value = objective.objective(watched)
        except optuna.TrialPruned:
            value, pruned = None, True
        job = self.jobs.get(thread)
        if job is None:
            return "pruned (these options were tried already)" if pruned else "failed (no task was made)"
        trial.set_user_attr("task", job.task_id())
        if job.is_failed():
            job.task.reload()
            return f"failed ({one_line(job.task.data.status_reason or 'see its task', 200)})"
        if watched.pruned:
            return f"pruned after epoch {watched.epoch}"
        if value is None or not job.is_completed():
            return "failed (its task was stopped, or never started)"
        watched.catch_up()  # with scores since the last check
        return float(value)

    def name(self, base: str, options: dict[str, Any]) -> str:
        """The task of a trial."""
        return f"{self.plan.folder.path.name}-{self.numbers[threading.get_ident()]:04d}"

    def finished(self, study: optuna.Study, trial: Any) -> None:
        """Write the options of the best trial."""
        keep_best(self.plan, study, trial.number)

    def release(self) -> None:
        """Repeat the trials that were interrupted."""
        for number, params in self.running.items():
            release(self.study, number, params)


class _Watched:
    """A trial for ClearML's objective: options by ClearML's names, scores by epoch."""

    def __init__(self, trial: optuna.Trial, trials: _Trials, epochs: int):
        self.trial, self.trials, self.epochs, self.epoch, self.pruned = trial, trials, epochs, 0, False
        self.options = {trials.names[name]: value for name, value in trial.params.items()}

    def suggest_float(self, name: str, **_: Any) -> Any:
        """The values chosen by the study."""
        return self.options[name]

    suggest_int = suggest_categorical = suggest_float

    def report(self, value: float, step: int) -> None:
        """Report to the study the last epoch of the scores that ClearML lists by step."""
        self.catch_up()

    def catch_up(self) -> None:
        """Report every epoch since the last call to the study."""
        scalars = self.trials.jobs[threading.get_ident()].task.get_reported_scalars()
        scores = scalars.get(SCORE[0], {}).get(SCORE[1], {}).get("y", [])
        for epoch in range(self.epoch + 1, len(scores) + 1):
            self.trial.report(scores[epoch - 1], epoch)
        self.epoch = max(self.epoch, len(scores))

    def should_prune(self) -> bool:
        """Whether the trial is below the median; not checked after the last epoch."""
        self.pruned = self.epoch < self.epochs and self.trial.should_prune()
        return self.pruned


class _Optimizer(OptimizerOptuna):
    """ClearML's Optuna optimiser, on the study of a folder instead of one in memory."""

    def __init__(self, trials: _Trials, **options: Any):
        super().__init__(**options)
        self.trials = trials

    def start(self) -> None:
        """Run the trials; returns when it is stopped, so that ClearML's last report includes them."""
        objective = OptunaObjective(
            base_task_id=self._base_task_id,
            queue_name=self._execution_queue,
            optimizer=self,
            max_iteration_per_job=None,
            min_iteration_per_job=None,
            sleep_interval=0,
            config_space=self._convert_hyper_parameters_to_optuna(),
        )
        self._study = self.trials.study
        _, self.trials.error = attempt(
            self._study.optimize,
            lambda trial: self.trials.run(objective, trial),
            n_trials=self.total_max_jobs,
            n_jobs=self._num_concurrent_workers,
            catch=(TrialFailed,),
            callbacks=[self.trials.finished],
        )
        self.trials.done.set()
        self._stop_event.wait()

    def helper_create_job(self, *arguments: Any, **options: Any) -> Any:
        """See ClearML; also stores the job of each trial."""
        job = super().helper_create_job(*arguments, **options)
        self.trials.jobs[threading.get_ident()] = job
        return job

    def monitor_job(self, job: Any) -> bool:
        """See ClearML; adds a pause, because its objective polls the server without one until there is a score."""
        self._stop_event.wait(POLL_SECONDS)
        return not self.trials.ending and super().monitor_job(job)


def _parameter(name: str, part: Range | Choice) -> Any:
    """An option of the space in ClearML's form."""
    if isinstance(part, Choice):
        return DiscreteParameterRange(name, values=part.plain())
    if part.whole:
        return UniformIntegerParameterRange(name, int(part.low), int(part.high))
    if part.log:
        return LogUniformParameterRange(name, math.log10(part.low), math.log10(part.high))
    return UniformParameterRange(name, part.low, part.high)
