"""Run folders: one process each, several starts at once, and messages about missing or occupied folders."""

import json
import multiprocessing
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from conftest import in_a_fork
from crash_loop import OPTIONS, outcome, same
from safetensors import safe_open
from trainer_helpers import make_trainer

import train
from common import errors
from common.errors import EnvironmentFault, UserError, exit_code_of
from common.files import write_json
from config.config import Config, write_config
from evaluation import figures, report
from features.cache import FeatureCache
from storage.export import export_model
from storage.folder import RunFolder


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_run_folder_is_noticed_at_the_end_of_the_epoch(tmp_path, splits, replaced):
    trainer = make_trainer(tmp_path / "run", splits)
    end_epoch = trainer._end_epoch

    def remove(values):
        if trainer.epoch == 2:
            shutil.rmtree(tmp_path / "run")
            if replaced:
                (tmp_path / "run").write_text("a file")
        end_epoch(values)

    trainer._end_epoch = remove
    with pytest.raises(EnvironmentFault, match=r"run folder \S*run was removed.*it had no checkpoint yet"):
        trainer.fit()
    assert trainer.epoch == 2
    assert replaced or not (tmp_path / "run").exists()  # and does not come back half empty
    if replaced:
        with pytest.raises(EnvironmentFault, match=r"cannot be created: (Not a directory|File exists)"):
            RunFolder.create(tmp_path / "run", "test")


def test_file_permissions_for_other_users_are_kept(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, epochs=2)
    export_model(trainer.run, trainer.fit())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (trainer.run.weights, trainer.run.model)}
    assert modes["model.safetensors"] == modes["model.json"]


def test_runs_that_start_at_once_get_separate_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pids = []
    for _ in range(8):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                for _ in range(5):
                    run = RunFolder.create(None, "test")
                    with run.claimed():
                        run.metrics.write_text("kept")
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert len(list((tmp_path / "runs").iterdir())) == 40


def test_a_run_folder_serves_one_process_at_a_time(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    litter = run.last.with_name(".last.pt.1.partial")
    litter.write_text("half")
    with run.claimed():
        assert not litter.exists()
        run.metrics.write_text("{}")

        def second():
            with RunFolder.create(tmp_path / "run", "test").claimed():
                pass

        code, line = in_a_fork(second)
        assert code == 2 and "is in use by another process" in line
        assert run.metrics.exists()  # the one that was refused has not touched what the first has written
    assert in_a_fork(second)[0] == 0


def _train(log, *arguments):
    """A separate program, which waits for its threads like Python at exit."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
    sys.argv = ["train.py", *map(str, arguments)]
    errors.exit_process(exit_code_of(train.main))


@pytest.mark.slow
def test_two_runs_that_fill_one_feature_cache_end_with_the_same_bits(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, draft, features = context.Barrier(2), FeatureCache.draft, tmp_path / "features"

    def draft_together(cache, *arguments):
        barrier.wait(600)  # neither run has found this view
        return draft(cache, *arguments)

    monkeypatch.setattr(FeatureCache, "draft", draft_together)
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])  # figures cost seconds
    monkeypatch.setattr(report, "write_report", lambda *arguments: None)
    options = [*OPTIONS, "--train.epochs", 3, "--router.warmup_steps", 5, "--features.cache_dir", features]
    runs = [tmp_path / name for name in ("a", "b")]
    both = [context.Process(target=_train, args=(f"{run}.log", "--run_dir", run, *options)) for run in runs]
    for process in both:
        process.start()
    try:
        for process in both:
            process.join()
    finally:
        for process in both:
            process.kill()
    said = [Path(f"{run}.log").read_text() for run in runs]
    assert [process.exitcode for process in both] == [0, 0], said
    assert not any("features: " in text for text in said), said  # nothing corrupt, altered, or not kept
    a, b = map(outcome, runs)
    assert same(a, b) and len(a["lines"]) == 3
    stored = sorted(features.iterdir())
    assert [path.name.rpartition("-")[0] for path in stored] == [
        "test-plain",
        "train-view0",
        "train-view1",
        "validation-plain",
    ]
    for path in stored:
        with safe_open(path, "pt") as file:
            key = json.loads(file.metadata()["key"])
        assert FeatureCache(features).load(key) is not None


def test_an_unusable_folder_is_reported_before_any_work(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", "test")
    monkeypatch.setattr(train, "load_inputs", lambda config: pytest.fail("has begun to load"))

    def told(*words):
        monkeypatch.setattr("sys.argv", ["train.py", "--config", "configs/digits.yaml", *map(str, words)])
        return in_a_fork(train.main)

    with run.claimed():
        assert told("--run_dir", run.path) == (2, f"error: {busy(run)}\n")
        write_config(Config(), run.config)
        monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(run.path)])
        assert in_a_fork(train.main) == (2, f"error: {busy(run)}\n")
        write_json(run.model, {})
    code, line = told("--run_dir", run.path)
    assert code == 2 and "already holds a run" in line
    run.require_not_busy()  # the first check has claimed nothing
    with run.claimed(), pytest.raises(UserError, match="in use"):
        run.require_not_busy()


def busy(run):
    return f"{run.path} is in use by another process: wait for it, or choose another --run_dir"


@pytest.mark.parametrize("mine", [False, True])
def test_a_run_without_results_leaves_no_folder(tmp_path, mine):
    path = tmp_path / "run"
    if mine:
        path.mkdir()
        (path / "notes.txt").write_text("not of the run")

    def fail():
        run = RunFolder.create(path, "test")
        with run.claimed():
            run.config.write_text("{}")
            run.metrics.write_text("")
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fail()
    assert [item.name for item in tmp_path.rglob("*")] == (["run", "notes.txt"] if mine else [])
