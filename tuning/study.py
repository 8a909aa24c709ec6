"""An Optuna study in a folder: its trials, the next trial, and their values."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import EnvironmentFault, UserError, one_line
from common.locks import try_lock
from common.text import printable, quoted
from config.config import Config, flatten
from storage.folder import INCIDENTAL, RunFolder
from tuning.space import Space, as_plain

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

NAME = "tuning"
STARTUP = 5  # trials before the first one is pruned


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study. storage: URL of a database instead of the SQLite file in the folder."""

    path: Path
    storage: str | None = None

    @property
    def url(self) -> str:
        return self.storage or f"sqlite:///{(self.path / 'study.db').absolute()}"

    @property
    def best(self) -> Path:
        return self.path / "best.yaml"

    def trial(self, number: int) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.path / "trials" / f"{number:04d}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from choosing a trial inside the block."""
        with (self.path / ".lock").open("wb") as file:
            while not try_lock(file):
                time.sleep(0.05)
            yield


def require_optuna() -> None:
    """Raise EnvironmentFault if Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentFault("tune.py needs Optuna, which is not installed: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_study(folder: StudyFolder, space: Space, config: Config, seed: int, prune: bool = True) -> "Study":
    """The study of a folder, created if there is none.

    seed: of the search. prune: stop trials that are below the median at the same epoch. Raises UserError if the folder
    contains a study with a different space or different options, EnvironmentFault if its file cannot be used.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{printable(folder.path)} cannot be created: {error.strerror}; choose another --out"
        ) from error
    connect = {"connect_args": {"timeout": 60}} if folder.url.startswith("sqlite") else {}
    warmup = max(1, config.train.epochs // 4)
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(folder.url, engine_kwargs=connect),
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(STARTUP, warmup) if prune else optuna.pruners.NopPruner(),
            study_name=NAME,
            direction="maximize",
            load_if_exists=True,
        )
        with folder.locked():
            _require_same(study, folder, "space", as_plain(space))
            _require_same(study, folder, "options", _options(config, space))
    except ImportError as error:
        raise EnvironmentFault(
            f"--storage {printable(folder.url)} needs a driver that is not installed: install the one that SQLAlchemy "
            "names for this database, or leave --storage out"
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        where = printable(folder.storage or folder.path / "study.db")
        reason = one_line(str(getattr(error, "orig", error)), 160)
        other = "--storage" if folder.storage else "--out"
        raise EnvironmentFault(f"{where} cannot be used as a study: {reason}; choose another {other}") from error
    return study


def _options(config: Config, space: Space) -> dict[str, Any]:
    """The values shared by all trials."""
    return {key: value for key, value in flatten(config.to_dict()).items() if key not in INCIDENTAL | space.keys()}


def _require_same(study: "Study", folder: StudyFolder, what: str, values: dict[str, Any]) -> None:
    """Store the values with a new study; raise UserError if an existing study has different ones."""
    text = json.dumps(values, sort_keys=True)
    kept = study.user_attrs.get(what)
    if kept is None:
        study.set_user_attr(what, text)
        return
    before, now = json.loads(kept), json.loads(text)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            sides = [one_line(json.dumps(side[name]), 60) if name in side else "nothing" for side in (before, now)]
            raise UserError(
                f"{quoted(folder.path)} contains a study with {'another space' if what == 'space' else 'other options'}"
                f": {name} was {sides[0]} and is now {sides[1]}; choose another --out, or change it back"
            )


def next_trial(study: "Study", folder: StudyFolder, most: int) -> "Trial | None":
    """The next trial, or None if there are enough. Call it only while the folder is locked.

    An unfinished trial of a killed process is ended first, and repeated.
    """
    release_dead(study, folder)
    return study.ask() if len(counted(study)) < most else None


def release_dead(study: "Study", folder: StudyFolder) -> None:
    """Mark trials of killed processes as failed and enqueue them again. Call this while the folder is locked."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if _is_dead(folder.trial(trial.number)):
            release(study, trial.number, trial.params)


def _is_dead(run: RunFolder) -> bool:
    try:
        run.require_not_busy()
    except UserError:
        return False
    return True


def release(study: "Study", number: int, params: dict[str, Any]) -> None:
    """End an interrupted trial, which does not count, and queue a trial with the same values."""
    from optuna.trial import TrialState

    study.set_user_attr("interrupted", [*study.user_attrs.get("interrupted", []), number])
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    if params:
        study.enqueue_trial(params)


def counted(study: "Study") -> "list[FrozenTrial]":
    """The trials that count, in order: without waiting and interrupted ones."""
    interrupted = study.user_attrs.get("interrupted", [])
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.name != "WAITING" and trial.number not in interrupted]


def ranked(study: "Study") -> "list[FrozenTrial]":
    """The completed trials, sorted by decreasing validation macro-F1; ties by number."""
    whole = [trial for trial in counted(study) if trial.state.name == "COMPLETE"]
    return sorted(whole, key=lambda trial: (-float(trial.value or 0.0), trial.number))
