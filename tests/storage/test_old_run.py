"""A run of an earlier version, in data/digits_run, can still be used, evaluated and continued with the same results.

Eight epochs on 200 digits; the later results of the version that made it are written here.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
import predict
import train
from common.errors import Interrupted, exit_code_of
from evaluation.compare import load
from storage.folder import RunFolder
from training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch, without_figures) -> RunFolder:
    """A copy of the run, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path(shutil.copytree(ROOT / "tests/storage/data/digits_run", tmp_path / "run")))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a program in this process: its exit code, standard output and standard error."""

    def call(program, *words):
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        code = exit_code_of(program.main)
        return code, *capsys.readouterr()

    return call


def test_it_predicts(run, call, tmp_path):
    grey = (load_digits().images[0] * (255 / 16)).round().astype("uint8")
    Image.fromarray(grey).save(tmp_path / "zero.png")
    code, output, _ = call(predict, run.path, tmp_path / "zero.png", "--json")
    (answer,) = json.loads(output)["images"]
    assert code == 0 and answer["classes"][0]["name"] == "0"
    assert answer["classes"][0]["probability"] == pytest.approx(0.25408, abs=1e-3)
    assert [expert["expert"] for expert in answer["experts"]] == [1, 2]


def test_it_is_evaluated(run, call):
    before = json.loads(run.results.read_text())
    assert run.scored
    code, output, _ = call(evaluate, run.path)
    after = json.loads(run.results.read_text())
    assert code == 0 and "macro-F1     27.33 %" in output
    for name in ("accuracy", "macro_f1", "loss", "expert_load", "expert_importance"):
        assert after[name] == pytest.approx(before[name], abs=1e-3)


def test_fewer_epochs_than_already_trained_are_rejected(run, call):
    before = run.config.read_text()
    code, _, line = call(train, "--resume", run.path, "--train.epochs", "5")
    assert code == 2 and line.count("\n") == 1
    assert "cannot stop at epoch 5, because it has reached epoch 8: set --train.epochs to 8 or more" in line
    assert run.config.read_text() == before
    code, output, _ = call(train, "--resume", run.path)
    assert code == 0 and "is finished: raise --train.epochs above 8" in output


def test_it_continues_and_keeps_its_results_until_there_are_new_ones(run, call, monkeypatch):
    results = json.loads(run.results.read_text())
    run.report.write_text("<html><body>\n<h1>run</h1></body></html>")
    end_epoch = Trainer._end_epoch

    def interrupted(trainer, values):
        end_epoch(trainer, values)
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", interrupted)
        code, output, _ = call(train, "--resume", run.path, "--train.epochs", "10")
    assert code == 130 and "after epoch 8 of 10" in output
    kept = json.loads(run.results.read_text())
    reason = "Results from before the run was resumed after epoch 8 of 10"
    assert kept == {"stale": reason, **results} and not run.scored
    assert run.report.read_text().count(reason) == 1
    compared = load(str(run.path))
    assert compared.name == "run" and "stale: results from before" in compared.state
    code, _, said = call(train, "--resume", run.path)
    assert code == 0 and "is finished" not in said
    losses = [line["loss/train"] for line in run.history()]
    assert len(losses) == 10 and losses[8:] == pytest.approx([1.82442, 1.75591], abs=1e-3)
    after = json.loads(run.results.read_text())
    assert "stale" not in after and run.scored and "Results from before" not in run.report.read_text()
    assert after["macro_f1"] == pytest.approx(results["macro_f1"], abs=1e-3)  # epoch 7 is still the best
    assert load(str(run.path)).name == "run"
