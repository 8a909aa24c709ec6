"""Complete runs of train.py in several processes, with and without distributed experts: they equal a single process.

Runs are shared by the tests, because a process takes a second of a core.
"""

import json
import shutil
import signal
from functools import cache

import pytest
import torch
from conftest import ROOT
from distributed_helpers import Program

from common.errors import Interrupted
from storage.checkpoint import load_checkpoint
from storage.folder import RunFolder
from training.trainer import Trainer

pytestmark = pytest.mark.slow
# Noise, random warm-up, a capacity that drops, a smaller last batch; no dropout, which each process draws itself.
HEAD = (
    "--config configs/digits.yaml --data.max_per_class 17 --neck.kind pooled --neck.dropout 0 --backbone.features "
    "[cls:1,mean:1] --router.warmup_steps 3 --router.capacity_factor 1.0 --experts.dropout 0 --train.batch_size 27 "
    "--train.epochs 4 --train.save_every 1 --tracking none"
)
BLOCKS = (
    "--config configs/digits_blocks.yaml --data.max_per_class 13 --router.warmup_steps 3 --train.batch_size 27 "
    "--train.epochs 2 --train.save_every 1 --train.patch_dropout 0.2 --tracking none --experts.blocks [3]"
)


RECIPES = {"head": HEAD, "blocks": BLOCKS}
SPREAD = "--parallel.experts 2 --parallel.placement lp"
STOP = 8  # a step of the second epoch


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, size: int, *words: object, stops_at: int | None = None, resume: bool = False, evaluates: bool = False):
    """A run in this number of processes, as `Program`; stops_at: the step after which it is interrupted."""
    where = [*words, "--resume" if resume else "--run_dir", folder / "run"]
    program = Program(folder, size, *where, before=lambda rank: stop_at(stops_at), evaluates=evaluates)
    wanted = 0 if stops_at is None else 128 + signal.SIGTERM
    assert program.codes() == [wanted] * size, program.said()
    return load_checkpoint(folder / "run" / "checkpoints" / "last.pt")


def stop_at(step: int | None) -> None:
    """Interrupt every process after a step."""
    train_batch = Trainer._train_batch

    def until(self, *arguments):
        train_batch(self, *arguments)
        if self.step == step:
            raise Interrupted(signal.SIGTERM)

    Trainer._train_batch = until


def apart(state: dict, other: dict) -> float:
    """The largest difference between two models; counters must be equal."""
    assert state.keys() == other.keys()
    return max((state[name].double() - other[name].double()).abs().max().item() for name in state)


def scores(folder) -> dict:
    return json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())


def history(folder) -> list[dict]:
    return [json.loads(line) for line in RunFolder(folder / "run").metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of an evaluated single-process run of a recipe, and its last checkpoint."""

    @cache
    def of(recipe: str):
        folder = tmp_path_factory.mktemp(recipe)
        return folder, run(folder, 1, *RECIPES[recipe].split(), evaluates=True)

    return of


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Create an interrupted run of the head, in this number of processes, in a folder."""

    @cache
    def of(size: int, words: str):
        folder = tmp_path_factory.mktemp("stopped")
        run(folder, size, *HEAD.split(), *words.split(), stops_at=STOP)
        return folder

    return lambda folder, size, words="": shutil.copytree(of(size, words) / "run", folder / "run")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_in_two_processes_is_that_of_one(recipe, tmp_path, alone):
    folder, one = alone(recipe)
    two = run(tmp_path, 2, *RECIPES[recipe].split(), evaluates=True)
    assert apart(one["model"], two["model"]) < 1e-5
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items() if "usage" in name)
    assert torch.equal(one["random"]["torch"], two["random"]["torch"])
    for first, second in zip(history(folder), history(tmp_path), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if not name.startswith("speed/"):
                assert second[name] == pytest.approx(value, abs=1e-4), name
    first, second = scores(folder), scores(tmp_path)
    assert first.keys() == second.keys()
    for name in ("accuracy", "macro_f1", "expert_samples", "expert_by_class", "confused_pairs"):
        assert first[name] == second[name], name
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert [row.get("macro_f1_change") for row in first["expert_worth"]] == [
        row.get("macro_f1_change") for row in second["expert_worth"]
    ]


def test_a_run_with_its_experts_on_two_processes_is_that_of_one(tmp_path, alone):
    _, one = alone("head")
    two = run(tmp_path, 2, *HEAD.split(), *SPREAD.split(), evaluates=True)
    assert apart(one["model"], two["model"]) < 1e-5
    assert apart(one["ema"], two["ema"]) < 1e-5
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()
    for index, entry in one["optimizer"]["state"].items():
        assert apart(entry, two["optimizer"]["state"][index]) < 1e-5
    learned = [line for line in history(tmp_path) if "placement/measured" in line]
    assert learned
    # Equal counts of unequal experts are unequal work, which a placement by measured loads corrects.
    assert learned[0]["placement/predicted"] < learned[0]["placement/measured"]
    assert learned[-1]["placement/measured"] < learned[0]["placement/measured"]
    assert load_checkpoint(RunFolder(tmp_path / "run").best)["model"].keys() == one["model"].keys()


def test_experts_inside_the_blocks_on_two_processes_are_those_of_one(tmp_path, alone):
    two = run(tmp_path, 2, *BLOCKS.split(), "--parallel.experts", 2)
    assert apart(alone("blocks")[1]["model"], two["model"]) < 1e-5


WORK = "--parallel.placement work --parallel.experts 2"
# Processes, and the number of them that share the experts.
RESUMED = [((1, 1), (2, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 2), (4, 2))]


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_a_run_resumes_on_another_number_of_processes(before, after, tmp_path, alone, stopped):
    _, whole = alone("head")
    stopped(tmp_path, before[0], WORK if before[1] > 1 else "")
    resumed = run(tmp_path, after[0], "--parallel.experts", after[1], "--parallel.placement", "work", resume=True)
    assert resumed["step"] == whole["step"]
    assert apart(whole["model"], resumed["model"]) < 1e-5


@pytest.mark.parametrize("spread", ["", SPREAD], ids=["data", "experts"])
def test_a_run_resumes_bit_by_bit_on_the_same_number(spread, tmp_path):
    words = [*HEAD.split(), *spread.split(), "--neck.dropout", "0.2", "--train.deterministic", "true"]
    whole = run(tmp_path / "whole", 2, *words)
    run(tmp_path / "parts", 2, *words, stops_at=STOP)
    resumed = run(tmp_path / "parts", 2, resume=True)
    for name in ("model", "ema"):
        assert all(torch.equal(value, resumed[name][key]) for key, value in whole[name].items())
    assert resumed.get("placement") == whole.get("placement")


def test_features_are_extracted_in_parts_and_stored_once(tmp_path):
    files = []
    for size in (1, 3):
        cache = tmp_path / f"cache{size}"
        words = [*HEAD.split(), "--train.epochs", 1, "--router.warmup_steps", 0, "--features.cache_dir", cache]
        run(tmp_path / str(size), size, *words)
        files.append({path.name: path.read_bytes() for path in cache.iterdir()})
    assert files[0] == files[1] and len(files[0]) == 2  # train and validation
    words = [*HEAD.split(), "--train.epochs", 1, "--router.warmup_steps", 0, "--features.cache_dir", "null"]
    kept_nowhere = run(tmp_path / "memory", 2, *words)
    assert apart(kept_nowhere["model"], load_checkpoint(tmp_path / "1/run/checkpoints/last.pt")["model"]) < 1e-5
