"""Whole runs of train.py with experts on several processes: they are the run of one, and so are their checkpoints."""

import json

import pytest
import torch
from conftest import ROOT
from test_runs import BLOCKS, HEAD, apart, run

from storage.checkpoint import load_checkpoint
from storage.folder import RunFolder

pytestmark = pytest.mark.slow
SPREAD = ("--parallel.experts", 2, "--parallel.placement", "lp")


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(tmp_path_factory.mktemp("whole"), 1, *HEAD.split())


def test_a_run_ends_as_that_of_one_process(tmp_path, whole):
    spread = run(tmp_path, 2, *HEAD.split(), *SPREAD, evaluates=True)
    assert apart(whole["model"], spread["model"]) < 1e-5
    assert apart(whole["ema"], spread["ema"]) < 1e-5
    assert spread["optimizer"]["state"].keys() == whole["optimizer"]["state"].keys()
    for index, entry in whole["optimizer"]["state"].items():
        assert apart(entry, spread["optimizer"]["state"][index]) < 1e-5
    folder = RunFolder(tmp_path / "run")
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    learned = [line for line in lines if "placement/measured" in line]
    assert learned
    # Equal counts of unequal experts are not equal work, which a placement by measured loads corrects.
    assert learned[0]["placement/predicted"] < learned[0]["placement/measured"]
    assert learned[-1]["placement/measured"] < learned[0]["placement/measured"]
    best = load_checkpoint(folder.best)
    assert best["model"].keys() == whole["model"].keys()


def test_inside_the_blocks_a_run_ends_as_that_of_one_process(tmp_path):
    spread = run(tmp_path / "2", 2, *BLOCKS.split(), "--parallel.experts", 2)
    assert apart(run(tmp_path / "1", 1, *BLOCKS.split())["model"], spread["model"]) < 1e-5


@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 2), (4, 2)), ((2, 2), (2, 1))])
def test_a_run_resumes_with_its_experts_elsewhere(before, after, tmp_path, whole):
    """before, after: processes, and how many of them share the experts."""
    spread = ("--parallel.placement", "work", "--parallel.experts")
    run(tmp_path, before[0], *HEAD.split(), *spread, before[1], stops_at=11)
    resumed = run(tmp_path, after[0], "--parallel.experts", after[1], resume=True)
    assert resumed["step"] == whole["step"]
    assert apart(whole["model"], resumed["model"]) < 1e-5


def test_a_run_resumes_bit_by_bit_in_as_many_processes(tmp_path):
    words = [*HEAD.split(), *SPREAD, "--train.deterministic", "true"]
    uninterrupted = run(tmp_path / "whole", 2, *words)
    run(tmp_path / "parts", 2, *words, stops_at=11)
    resumed = run(tmp_path / "parts", 2, resume=True)
    for name in ("model", "ema"):
        assert all(torch.equal(value, resumed[name][key]) for key, value in uninterrupted[name].items())
    assert resumed["placement"] == uninterrupted["placement"]
