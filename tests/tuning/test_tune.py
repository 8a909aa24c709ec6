"""tune.py: trials in separate processes, resumed, pruned, failed, and selected on validation alone."""

import importlib.util
import json
import multiprocessing
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

import tune
from common.errors import UserError, exit_code_of
from tuning import worker
from tuning.space import read_space
from tuning.study import StudyFolder, counted, next_trial, open_study, ranked, release
from tuning.worker import Plan

optuna = pytest.importorskip("optuna")

SMALL = ["--config", "configs/digits.yaml", "--tracking", "none", "--data.max_per_class", "20", "--train.epochs", "2"]
SMALL += ["--train.batch_size", "64", "--neck.kind", "pooled", "--backbone.features", "[cls:1]"]
SMALL += ["--features.cache_dir", "null", "--router.warmup_steps", "1"]
SPACE = "optim.lr: {low: 1e-4, high: 1e-2, log: true}\nrouter.kind: [noisy_topk, soft_moe]\n"


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return Plan(StudyFolder(tmp_path / "out"), read_space(tmp_path / "space.yaml"), SMALL, 3)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Run tune.py on tmp_path/space.yaml, in this process (its trials elsewhere): exit code, output, errors."""
    monkeypatch.chdir(ROOT)

    def run(space, *words):
        (tmp_path / "space.yaml").write_text(space, encoding="utf-8")
        places = ["--space", tmp_path / "space.yaml", "--out", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", list(map(str, ["tune.py", *SMALL, *places, *words])))
        return exit_code_of(tune.main), *capfd.readouterr()

    return run


@pytest.mark.slow
def test_trials_fail_the_study_continues_and_the_best_options_are_written(tmp_path, call):
    code, out, err = call(SPACE, "--trials", "3", "--jobs", "2")
    assert (code, err) == (0, ""), out
    code, out, _ = call(SPACE, "--trials", "6")
    assert code == 0 and len(re.findall("^trial +[0-9]+ ", out, re.MULTILINE)) == 3
    rows = json.loads((tmp_path / "out" / "trials.json").read_text(encoding="utf-8"))
    assert [row["trial"] for row in rows] == list(range(6))
    for row in rows:  # a rule that does not fit the neck fails, and nothing else does
        assert (row["state"] == "fail") == (row["router.kind"] == "soft_moe")
        assert not (tmp_path / "out" / "trials" / f"{row['trial']:04d}" / "evaluation").exists()
    best = max((row for row in rows if row["state"] == "complete"), key=lambda row: row["macro_f1"])
    options = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text(encoding="utf-8"))
    assert (options["optim"]["lr"], options["run_dir"]) == (best["optim.lr"], None)
    assert (tmp_path / "out" / "trials.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.name", "folder", "--data.root", "nowhere"], "nowhere"),
        (["--backbone.name", "vit_smal_patch16_224"], "did you mean vit_small_patch16_224"),
    ],
)
def test_what_would_fail_every_trial_is_reported_before_the_study(tmp_path, call, words, message):
    code, _, err = call(SPACE, "--trials", "1", *words)
    assert code == 2 and message in err.splitlines()[-1] and not (tmp_path / "out").exists()


def kill_the_trial():
    """Kill the training process, not this one, which waits for it."""
    (process,) = multiprocessing.active_children()
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_trial_is_repeated(tmp_path, call, number):
    log, main = tmp_path / "out" / "trials" / "0000" / "metrics.jsonl", threading.main_thread().ident

    def strike():
        deadline = time.monotonic() + 600
        while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_the_trial() if number == signal.SIGKILL else signal.pthread_kill(main, number)

    striker = threading.Thread(target=strike)
    striker.start()
    space = "optim.lr: [1e-3, 2e-3]"
    code, _, err = call(space, "--trials", "1", "--train.epochs", "5000", "--no_pruning")
    striker.join()
    assert code == (1 if number == signal.SIGKILL else 130), err
    study = optuna.load_study(study_name="tuning", storage=StudyFolder(tmp_path / "out").url)
    if number == signal.SIGKILL:
        assert "a process of the study ended with code -9" in err
        folder = StudyFolder(tmp_path / "out")
        with folder.locked():
            assert next_trial(study, folder, 1).number == 1
    else:
        assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"] and not counted(study)
        study.ask()
    assert study.user_attrs["interrupted"] == [0]
    assert study.trials[1].system_attrs["fixed_params"] == study.trials[0].params


def test_a_worker_ends_after_its_trial_if_the_study_was_killed(plan, monkeypatch):
    alive, trained, before = iter([True, True, False]), [], signal.getsignal(signal.SIGINT)
    parent = SimpleNamespace(is_alive=lambda: next(alive))  # that of the system is the process that forks the workers
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr("sys.argv", ["tune.py"])
    monkeypatch.setattr(
        worker, "_Worker", lambda *_: SimpleNamespace(trial=lambda: trained.append(1) or len(trained) < 5)
    )
    try:
        worker.work(plan, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(trained) == 2


def test_a_study_stops_at_the_requested_number_of_trials(plan):
    study = plan.study(0)
    for value in (0.5, 0.7, None):
        trial = next_trial(study, plan.folder, 3)
        study.tell(trial, value, state=None if value else optuna.trial.TrialState.FAIL)
    assert next_trial(study, plan.folder, 3) is None
    release(study, 2, {})
    assert len(counted(study)) == 2 and [trial.number for trial in ranked(study)] == [1, 0]
    assert next_trial(study, plan.folder, 3).number == 3


def test_a_trial_of_a_running_process_is_not_changed(plan):
    study = plan.study(0)
    with plan.folder.locked():
        trial = next_trial(study, plan.folder, 3)
        run = plan.folder.trial(trial.number)
        (run.path / "checkpoints").mkdir(parents=True)
    with run.claimed():
        assert next_trial(study, plan.folder, 3).number == 1
        assert study.trials[0].state.name == "RUNNING"
    next_trial(study, plan.folder, 3)
    assert study.trials[0].state.name == "FAIL"


def test_the_median_prunes_after_a_quarter_of_the_epochs(plan):
    config = plan.configure({"train.epochs": 8}, "")
    study = open_study(plan.folder, plan.space, config, 0)
    for value in (0.5, 0.6, 0.7, 0.8, 0.9):
        trial = study.ask()
        for epoch in range(1, 9):
            trial.report(value, epoch)
        study.tell(trial, value)
    trial = study.ask()
    pruned = []
    for epoch in range(1, 5):
        trial.report(0.1, epoch)
        pruned.append(trial.should_prune())
    assert pruned == [False, False, True, True] or pruned == [False, True, True, True]


def test_an_invalid_study_and_a_study_with_other_options(plan, tmp_path):
    plan.study(0)
    with pytest.raises(
        UserError, match=r"a study with other options: train\.epochs was 2 and is now 3; choose another"
    ):
        open_study(plan.folder, plan.space, plan.configure({"train.epochs": 3}, ""), 0)
    with pytest.raises(UserError, match=r"with another space: router\.kind was .* and is now nothing") as caught:
        open_study(plan.folder, {"optim.lr": plan.space["optim.lr"]}, plan.configure({}, ""), 0)
    assert "\n" not in str(caught.value)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "study.db").write_text("junk", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be used as a study: file is not a database; choose another --out"):
        open_study(StudyFolder(tmp_path / "junk"), plan.space, plan.configure({}, ""), 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "0"], "--trials is 0: give 1 or more"),
        (["--trials", "many"], "--trials is 'many': give a whole number"),
        (["--trials", "1", "--seeds", "3"], "--seeds works only with train.py"),
        (["--trials", "1", "--jobs", "0"], "--jobs is 0: give 1 or more"),
        ([], "required: --trials"),
    ],
)
def test_a_wrong_command_is_reported_in_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune.py", "--space", "s.yaml", *words])
    assert exit_code_of(tune.main) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_without_optuna_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("sys.argv", ["tune.py", "--space", "s.yaml", "--trials", "1"])
    assert exit_code_of(tune.main) == 1
    assert capsys.readouterr().err == "error: tune.py needs Optuna, which is not installed: pip install optuna\n"


@pytest.mark.parametrize(
    "words, line",
    [
        (["--out", "{}/space.yaml"], "space.yaml cannot be created: File exists; choose another --out"),
        (["--out", "{}/out", "--storage", "postgresql://nowhere/x"], "needs a driver that is not installed"),
    ],
)
def test_a_missing_folder_or_database_is_reported_in_one_line(words, line, tmp_path, monkeypatch, capsys):
    if "postgresql" in words[-1] and importlib.util.find_spec("psycopg2"):
        pytest.skip("the driver is installed")
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    words = [word.format(tmp_path) for word in words]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["tune.py", *SMALL, "--space", f"{tmp_path}/space.yaml", "--trials", "1", *words])
    assert exit_code_of(tune.main) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
