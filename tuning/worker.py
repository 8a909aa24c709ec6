"""A process that trains the trials of a study one after another."""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assembly.pipeline import Inputs, build_bank, build_trainer, load_inputs
from assembly.start import announce, tags_of
from common.errors import Interrupted, UserError, one_line
from common.files import write_text
from common.meter import duration
from common.signals import defer_signals, stoppable
from config.command_line import parse_command_line
from config.config import Config, as_yaml, write_config
from features.bank import FeatureBank
from features.images import ImageBank
from storage.folder import RunFolder
from tracking.agent import TASK_ID
from tracking.tracker import open_tracker
from training.length import shorten_warmup
from training.random_numbers import RandomNumbers
from tuning.space import Space, decoded, suggest
from tuning.study import StudyFolder, next_trial, open_study, ranked, release, require_optuna

if TYPE_CHECKING:
    from optuna import Study, Trial

PROGRAM = Path(__file__).resolve().parent.parent / "train.py"
OF_PARENT = ("CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID", *TASK_ID)
"""Variables that make ClearML's SDK attach a process to the task of its parent process or of an agent."""
FEATURES = ("data", "augment", "backbone", "features")
"""Sections of the configuration that inputs and features depend on, in addition to experts.place and train.epochs."""


@dataclass(frozen=True)
class Plan:
    """The settings shared by the processes of a study.

    words: the command line of the configuration, which the options of a trial override. trials: the total number of
    trials. parent: id of the parent ClearML task of the trials.
    """

    folder: StudyFolder
    space: Space
    words: list[str]
    trials: int
    prune: bool = True
    parent: str | None = None
    tracking: str = "none"

    def configure(self, options: dict[str, Any], place: str) -> Config:
        """The configuration of a trial. place: the source of the options, for messages. Raises UserError."""
        return parse_command_line(self.words, options, place).config

    def study(self, seed: int) -> "Study":
        """Open the study. seed: of the search."""
        return open_study(self.folder, self.space, self.configure({}, ""), seed, self.prune)


def work(plan: Plan, seed: int) -> None:
    """Train trials until there are enough of them, or until the parent process ends.

    A failed trial is recorded with its reason, and the next one starts. A signal interrupts the trial, which is
    repeated when the study continues.
    """
    require_optuna()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal: the parent process decides when to end
    for name in OF_PARENT:
        os.environ.pop(name, None)
    sys.argv[:] = [str(PROGRAM)]  # what ClearML takes for the program, so that agents train clones of a trial's task
    parent = multiprocessing.parent_process()  # not os.getppid(), the process that forks the workers
    try:
        with stoppable():
            worker = _Worker(plan, seed)
            while (parent is None or parent.is_alive()) and worker.trial():
                pass
    except Interrupted as error:
        sys.exit(error.exit_code)


class _Worker:
    def __init__(self, plan: Plan, seed: int):
        self.plan, self.study = plan, plan.study(seed)
        self.read: tuple[str, Inputs, FeatureBank | ImageBank] | None = None

    def trial(self) -> bool:
        """Train the next trial; False if there is none."""
        plan, folder, claim = self.plan, self.plan.folder, ExitStack()
        with claim:
            with folder.locked():
                trial = next_trial(self.study, folder, plan.trials)
                if trial is None:
                    return False
                options = suggest(trial, plan.space)
                run = RunFolder.create(folder.trial(trial.number).path, "trial")
                claim.enter_context(run.claimed())
            try:
                began = time.monotonic()
                outcome = self._outcome(trial, options, run)
            except Interrupted:
                with folder.locked():
                    release(self.study, trial.number, trial.params)
                raise
            with defer_signals, folder.locked():
                self._record(trial, outcome)
            print(trial_line(trial.number, options, outcome, time.monotonic() - began), flush=True)
            return True

    def _outcome(self, trial: "Trial", options: dict[str, Any], run: RunFolder) -> float | str:
        """The validation macro-F1, or the reason why there is none, in words."""
        with (run.path / "output.txt").open("w", encoding="utf-8") as output:
            try:
                with redirect_stdout(output), redirect_stderr(output):
                    return self._train(trial, self.plan.configure(options, f"trial {trial.number}"), run)
            except (
                UserError,
                MemoryError,
                RuntimeError,
                ValueError,
            ) as error:  # PyTorch raises these, for example out of memory
                return f"failed ({one_line(error, 200) or type(error).__name__})"

    def _train(self, trial: "Trial", config: Config, run: RunFolder) -> float | str:
        import optuna

        inputs, bank = self._inputs(config)
        config = shorten_warmup(config, len(inputs.splits.train))
        named = {"name": f"{self.plan.folder.path.name}-{trial.number:04d}", "tags": [*tags_of(config), "trial"]}
        values = config.to_dict()
        trainer = build_trainer(config, inputs, bank=bank)  # before a task, so that no mistake leaves a failed one
        bank.require_room()
        with RandomNumbers(inputs.device).all():  # ClearML sets its own seeds
            tracker = open_tracker(self.plan.tracking, run.path, values, **named, parent=self.plan.parent)
        with tracker:
            if tracker.mode == "clearml":
                trial.set_user_attr("task", tracker.task_id)
            write_config(config, run.config)
            trainer.record_in(run, tracker)
            announce(config, inputs, trainer)
            validate = trainer.validate

            def watched(model: Any) -> Any:
                validated = validate(model)
                with defer_signals:  # an interrupted transaction would lock the database
                    trial.report(validated.scores["macro_f1"], trainer.epoch)
                    hopeless = trainer.epoch < config.train.epochs and trial.should_prune()
                if hopeless:
                    raise optuna.TrialPruned
                return validated

            trainer.validate = watched
            try:
                macro_f1 = trainer.fit()["macro_f1"]
            except optuna.TrialPruned:
                return f"pruned after epoch {trainer.epoch}"
            tracker.summary({"validation/macro_f1": macro_f1})
            return macro_f1

    def _inputs(self, config: Config) -> tuple[Inputs, FeatureBank | ImageBank]:
        """Images, backbone and features, reused from the previous trial if they are the same."""
        values = config.to_dict()
        key = json.dumps([[values[name] for name in FEATURES], config.experts.place, config.train.epochs])
        if self.read is None or self.read[0] != key:
            self.read = None  # frees the memory for the next ones
            inputs = load_inputs(config)
            self.read = (key, inputs, build_bank(config, inputs.splits, inputs.backbone, inputs.device))
        return self.read[1:]

    def _record(self, trial: "Trial", outcome: float | str) -> None:
        from optuna.trial import TrialState

        if isinstance(outcome, str):
            trial.set_user_attr("reason", outcome)
            pruned = outcome.startswith("pruned")
            self.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
            return
        self.study.tell(trial, outcome)
        keep_best(self.plan, self.study, trial.number)


def trial_line(number: int, options: dict[str, Any], outcome: float | str, seconds: float) -> str:
    """What is printed of a trial. outcome: its validation macro-F1, or why there is none."""
    words = ", ".join(f"{name} {_text(value)}" for name, value in options.items())
    shown = outcome if isinstance(outcome, str) else f"validation macro-F1 {100 * outcome:.2f} %"
    return f"trial {number:3d}   {shown}, {duration(seconds)}: {words}"


def keep_best(plan: Plan, study: "Study", number: int) -> None:
    """Write the configuration of a trial where it is the best one so far."""
    best = ranked(study)
    if best and best[0].number == number:
        write_best(plan, best[0])


def write_best(plan: Plan, best: Any) -> None:
    """Write the configuration of the best trial as YAML for --config."""
    config = plan.configure(decoded(best.params, plan.space), f"trial {best.number}")
    config.run_dir = None
    note = f"# Trial {best.number} of {plan.folder.path.name}: validation macro-F1 {100 * best.value:.2f} %.\n"
    write_text(plan.folder.best, note + as_yaml(config))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
