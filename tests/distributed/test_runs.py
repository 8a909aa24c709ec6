"""Whole runs of train.py in two and three processes: what they come to, and how a run changes their number."""

import json
import signal

import pytest
import torch
from conftest import ROOT
from distributed_helpers import Program

from common.errors import Interrupted
from storage.checkpoint import load_checkpoint
from training.trainer import Trainer

pytestmark = pytest.mark.slow
# Noise, random warm-up, a capacity that drops, a last batch of 18 images; no dropout, which each process draws itself.
HEAD = (
    "--config configs/digits.yaml --data.max_per_class 25 --neck.kind pooled --neck.dropout 0 --backbone.features "
    "[cls:1,mean:1] --router.warmup_steps 3 --router.capacity_factor 1.0 --experts.dropout 0 --train.batch_size 27 "
    "--train.epochs 4 --train.save_every 1 --tracking none"
)
BLOCKS = (
    "--config configs/digits_blocks.yaml --data.max_per_class 25 --router.warmup_steps 3 --train.batch_size 27 "
    "--train.epochs 2 --train.save_every 1 --train.patch_dropout 0.2 --tracking none --experts.blocks [3]"
)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, size: int, *words: object, stops_at: int | None = None, resume: bool = False, evaluates: bool = False):
    """A run in so many processes, as `Program`; stops_at: the step after which it is interrupted."""
    where = [*words, "--resume" if resume else "--run_dir", folder / "run"]
    program = Program(folder, size, *where, before=lambda rank: stop_at(stops_at), evaluates=evaluates)
    wanted = 0 if stops_at is None else 128 + signal.SIGTERM
    assert program.codes() == [wanted] * size, program.said()
    return load_checkpoint(folder / "run" / "checkpoints" / "last.pt")


def stop_at(step: int | None) -> None:
    """Have every process interrupted after a step."""
    train_batch = Trainer._train_batch

    def until(self, *arguments):
        train_batch(self, *arguments)
        if self.step == step:
            raise Interrupted(signal.SIGTERM)

    Trainer._train_batch = until


def apart(state: dict, other: dict) -> float:
    """The largest difference between two models; counters have to be equal."""
    assert state.keys() == other.keys()
    return max((state[name].double() - other[name].double()).abs().max().item() for name in state)


def scores(folder) -> dict:
    return json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())


@pytest.mark.parametrize("words", [HEAD, BLOCKS], ids=["head", "blocks"])
def test_a_run_in_two_processes_is_that_of_one(words, tmp_path):
    one, two = (run(tmp_path / str(size), size, *words.split(), evaluates=True) for size in (1, 2))
    assert apart(one["model"], two["model"]) < 1e-5
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items() if "usage" in name)
    assert torch.equal(one["random"]["torch"], two["random"]["torch"])
    lines = [
        [json.loads(line) for line in (tmp_path / str(size) / "run" / "metrics.jsonl").read_text().splitlines()]
        for size in (1, 2)
    ]
    for first, second in zip(*lines, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if not name.startswith("speed/"):
                assert second[name] == pytest.approx(value, abs=1e-4), name
    first, second = scores(tmp_path / "1"), scores(tmp_path / "2")
    assert first.keys() == second.keys()
    for name in ("accuracy", "macro_f1", "expert_samples", "expert_by_class", "confused_pairs"):
        assert first[name] == second[name], name
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert [row.get("macro_f1_change") for row in first["expert_worth"]] == [
        row.get("macro_f1_change") for row in second["expert_worth"]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(tmp_path_factory.mktemp("whole"), 1, *HEAD.split())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_resumes_on_another_number_of_processes(before, after, tmp_path, whole):
    run(tmp_path / "parts", before, *HEAD.split(), stops_at=11)
    resumed = run(tmp_path / "parts", after, resume=True)
    assert resumed["step"] == whole["step"]
    assert apart(whole["model"], resumed["model"]) < 1e-5


def test_a_run_resumes_bit_by_bit_on_the_same_number(tmp_path):
    words = [*HEAD.split(), "--neck.dropout", "0.2", "--train.deterministic", "true"]
    whole = run(tmp_path / "whole", 2, *words)
    run(tmp_path / "parts", 2, *words, stops_at=11)
    resumed = run(tmp_path / "parts", 2, resume=True)
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert all(torch.equal(value, resumed["ema"][name]) for name, value in whole["ema"].items())


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
