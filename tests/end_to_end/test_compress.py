"""compress.py from the user's view, on a run of digits: the smaller run is evaluated, used and continued."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT

import compress
import evaluate
import train
from assembly.loading import load_trained
from common.errors import Interrupted, exit_code_of
from evaluation.latency import latency
from training.trainer import Trainer


@pytest.fixture
def call(monkeypatch, capsys, without_figures):
    """Exit code, standard output and lines of standard error of a program; no figures, and rough latencies."""
    monkeypatch.setattr("assembly.compressing.latency", lambda *found: latency(*found[:3], seconds=0.01))
    monkeypatch.chdir(ROOT)

    def run(program, *words):
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        code = exit_code_of(program.main)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.mark.slow
def test_a_pruned_run_is_an_ordinary_run(tiny_run, tmp_path, call):
    out = tmp_path / "pruned"
    code, shown, _ = call(compress, tiny_run, "--out", out, "--prune", "1")
    assert code == 0
    assert "1 · 32   " in shown and "removed" in shown and "latency of 256 images" in shown
    found = json.loads((out / "compression.json").read_text())
    assert [row["becomes"] for row in found["experts"]] == [0, None, 1, 2]
    whole = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())
    results = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert found["before"]["macro_f1_test"] == whole["macro_f1"]
    assert found["after"]["macro_f1_test"] == results["macro_f1"]
    # As predicted by the evaluation of the original run.
    change = whole["expert_worth"][1]["macro_f1_change"]
    assert results["macro_f1"] == pytest.approx(whole["macro_f1"] + change)
    before, after = found["before"], found["after"]
    for name in ("file_bytes", "memory_bytes", "expert_bytes", "trained_parameters"):
        assert after[name] < before[name]
    assert yaml.safe_load((out / "config.yaml").read_text())["experts"]["sizes"] == [[16], [64], [128]]
    assert "What was done to each expert" in (out / "evaluation" / "report.html").read_text()

    assert call(evaluate, out, "--tracking", "none")[0] == 0
    again = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert again["macro_f1"] == results["macro_f1"] and again["compression"] == found
    assert load_trained(out).model.moe.router.num_experts == 3

    code, shown, _ = call(train, "--resume", out, "--train.epochs", "5")
    assert code == 0 and "epoch   5/5" in shown


@pytest.mark.slow
def test_a_run_in_eight_bits_is_an_ordinary_run(tiny_run, tmp_path, call):
    out = tmp_path / "int8"
    words = ("--quantise", "int8", "--quantise.protect", "1", "--quantise.rows", "64", "--prune", "3")
    code, shown, _ = call(compress, tiny_run, "--out", out, *words)
    assert code == 0 and all(f"calibrated {how}: macro-F1" in shown for how in ("equal", "as_they_come", "none"))
    found = json.loads((out / "compression.json").read_text())
    assert [row["done"] for row in found["experts"]] == [["int8"], ["float16"], ["int8"], ["removed"]]
    assert all(0 < row["error"] < 0.05 for row in found["experts"][:3])
    assert found["after"]["expert_bytes"] < 0.5 * found["before"]["expert_bytes"]
    assert yaml.safe_load((out / "config.yaml").read_text())["experts"]["weights"] == ["int8", "float16", "int8"]
    results = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert sum(row["bytes"] for row in results["expert_worth"]) == found["after"]["expert_bytes"]
    assert results["cost"]["trained_parameters"] == found["after"]["trained_parameters"]  # without scales

    before = load_trained(out).model.moe.experts
    assert before[0][0].parametrizations.weight.original0.dtype == torch.int8
    code, shown, _ = call(train, "--resume", out, "--train.epochs", "5")
    assert code == 0 and "epoch   5/5" in shown
    after = torch.load(out / "checkpoints" / "last.pt", weights_only=True)["model"]
    name = "moe.experts.0.0.parametrizations.weight.original0"
    assert torch.equal(after[name], before[0][0].parametrizations.weight.original0)
    assert not torch.equal(after["moe.router.gate.weight"], load_trained(tiny_run).model.moe.router.gate.weight)
    for words in ((), ("--experts.weights", "float32")):
        code, _, lines = call(train, "--init", out, *words, "--run_dir", tmp_path / "new", "--tracking", "none")
        assert code == 2 and "stores its experts in fewer bits: start from the run" in lines[-1]
    code, _, lines = call(compress, out, "--out", tmp_path / "again", "--prune", "0")
    assert code == 2 and "already quantised" in lines[-1] and not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_run_with_merged_experts_is_an_ordinary_run(tiny_run, tmp_path, call):
    out = tmp_path / "merged"
    code, shown, _ = call(compress, tiny_run, "--out", out, "--merge", "2", "--prune", "0")
    assert code == 0 and "merge        averaged: macro-F1" in shown
    found = json.loads((out / "compression.json").read_text())
    assert [step["step"] for step in found["steps"]] == ["prune", "merge"]
    [groups] = found["steps"][1]["groups"]
    assert sorted(member for members in groups for member in members) == [0, 1, 2] and len(groups) == 2
    assert found["after"]["expert_bytes"] < found["before"]["expert_bytes"]
    alone, pair = sorted(groups, key=len)
    names = [row["expert"] for row in found["experts"][1:]]
    assert found["experts"][1 + alone[0]]["done"] == []
    assert found["experts"][1 + pair[0]]["done"] == [f"merged with {names[pair[1]]}"]
    assert load_trained(out).model.moe.router.num_experts == 2


@pytest.mark.slow
def test_an_ensemble_is_distilled_into_a_dense_student_in_eight_bits(tiny_run, tmp_path, call):
    out = tmp_path / "student"
    words = ("--distil", "dense", "--distil.epochs", "3", "--quantise", "int8", "--quantise.rows", "64")
    code, shown, _ = call(compress, tiny_run, tiny_run, "--out", out, *words)
    assert code == 0 and "epoch   3/3" in shown and f"teachers     {tiny_run}, {tiny_run}" in shown
    found = json.loads((out / "compression.json").read_text())
    assert [step["step"] for step in found["steps"]] == ["distil", "quantise"] and len(found["from"]) == 2
    assert found["experts"][-1]["expert"].startswith("student 0") and found["experts"][-1]["done"] == ["taught", "int8"]
    assert found["after"]["active_parameters"] == found["after"]["trained_parameters"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["experts"]["weights"] == "int8" and config["twin_of"] is None
    assert call(evaluate, out, "--tracking", "none")[0] == 0


@pytest.mark.slow
def test_an_interrupted_distillation_continues(tiny_run, tmp_path, call, monkeypatch):
    out, again = tmp_path / "taught", tmp_path / "interrupted"
    words = ("--prune", "0", "--distil", "sparse", "--distil.epochs", "2")
    code, shown, _ = call(compress, tiny_run, "--out", out, *words)
    assert code == 0 and "random routing" not in shown
    found = json.loads((out / "compression.json").read_text())
    assert [row["done"] for row in found["experts"]] == [["removed"], ["taught"], ["taught"], ["taught"]]
    pruned = load_trained(tiny_run).model.moe.experts[1][0].weight
    taught = load_trained(out).model.moe.experts[0][0].weight
    assert 0 < (taught - pruned).norm() < 0.5 * pruned.norm()  # from there, after a few steps
    assert not (out / "teachers.json").exists()

    train_epoch = Trainer._train_epoch

    def interrupted(trainer, progress):
        if trainer.epoch == 2:
            raise Interrupted(2)
        return train_epoch(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", interrupted)
        code, _, lines = call(compress, tiny_run, "--out", again, *words)
    assert code == 130 and f"--resume {again} continues from the last checkpoint, with its teachers" in lines[-2]
    kept = (again / "teachers.json").read_text()
    (again / "teachers.json").write_text(kept.replace(str(tiny_run), str(tmp_path / "gone")))
    code, _, lines = call(train, "--resume", again)
    assert code == 2 and f"is distilled from {tmp_path}/gone, which cannot be opened" in lines[-1]
    (again / "teachers.json").write_text(kept)
    code, shown, _ = call(train, "--resume", again)
    assert code == 0 and f"teachers     {tiny_run}" in shown and "epoch   2/2" in shown
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_experts_in_eight_bits_are_not_trained_from_the_start(call, tmp_path):
    words = ("--config", "configs/digits.yaml", "--experts.weights", "int8", "--run_dir", tmp_path / "run")
    code, _, lines = call(train, *words, "--tracking", "none")
    assert code == 2 and len(lines) == 1 and "train in float32, then compress the run" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_number_format_that_a_device_lacks_is_reported_in_one_line(tiny_run, tmp_path, call, monkeypatch):
    def lacks(*_):
        raise RuntimeError("no kernel for float8\non this device")

    monkeypatch.setattr("compression.quantise.unpack", lacks)
    code, _, lines = call(compress, tiny_run, "--out", tmp_path / "out", "--quantise", "fp8")
    assert code == 2 and len(lines) == 1 and "--quantise fp8 does not work on cpu (no kernel for float8 on" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prune 0 1 2", "leaves 1 of 4 experts"),
        ("--prune 0 1 2 3", "names all 4 experts"),
        ("--prune 7", "names expert 7"),
        ("--prune -1", "--prune has -1: give expert numbers"),
        ("--prune one", "--prune has one: give expert numbers"),
        ("--prune auto 1", "--prune has auto: give expert numbers"),
        ("--prune auto --budget -1", "--budget is -1"),
        ("", "nothing to do"),
        ("--merge 5", "--merge is 5: there are 4 experts"),
        ("--merge 1", "fewer experts than each sample uses"),
        ("--prune 0 1 --merge 2", "--merge is 2: there are 2 experts"),
        ("--prune auto --merge 4", "--merge is 4: there are 4 experts to merge, so give 2 to 3"),
        ("--merge two", "--merge is 'two': give a whole number"),
        ("--distil sparse --distil.sizes [[4]]", "--distil sparse: router.top_k is 2 but experts.sizes names 1"),
        ("--distil dense --distil.sizes [[4],[5]]", "names 2 experts: a dense student has one"),
        ("--distil dense --distil.sizes wide", "--distil.sizes is wide: give"),
        ("--distil dense --distil.sizes [[-4]]", "--distil dense: experts.sizes has [-4]: hidden layers need 1 to"),
        ("--distil dense --prune 0", "leave out --prune and --merge"),
        ("--prune 0 --distil.epochs 3", "--distil.epochs needs --distil: add it"),
        ("--prune 0 --distil.weight 0.7", "--distil.weight needs --distil: add it"),
        ("--prune 0 --quantise.rows 64", "--quantise.rows needs --quantise: add it"),
        ("--prune 0 --budget 1", "--budget needs --prune auto or --quantise.protect auto"),
        ("--distil dense --distil.epochs 0", "--distil.epochs is 0"),
        ("--distil dense --distil.weight 2", "--distil.weight is 2: it must be from 0 to 1"),
        ("--distil dense --distil.temperature 0", "--distil.temperature is 0"),
        ("--quantise int4", "invalid choice: 'int4'"),
        ("--prune 0 --quantise.protect auto", "--quantise.protect needs --quantise"),
        ("--prune 0 --quantise int8 --quantise.protect 3", "names expert 3: only experts 0 to 2 remain"),
        ("--quantise int8 --quantise.rows 0", "--quantise.rows is 0"),
        ("--prune 1 --device gpu", "device is 'gpu'"),
        ("--prune 1 --data.root nowhere --backbone.weights nowhere", "nowhere are missing"),
    ],
)
def test_impossible_requests_are_reported_in_one_line_and_write_nothing(tiny_run, tmp_path, call, words, message):
    out = tmp_path / "out"
    code, _, lines = call(compress, tiny_run, "--out", out, *words.split())
    assert code in (1, 2) and len(lines) == 1 and message in lines[0]
    assert not out.exists()


def test_an_ensemble_needs_one_dataset(tiny_run, tmp_path, call, monkeypatch):
    other = iter(range(9))
    monkeypatch.setattr("assembly.distilling._read", lambda opened: next(other))
    words = ("--out", tmp_path / "out", "--distil", "dense")
    code, _, lines = call(compress, tiny_run, tiny_run, *words)
    assert code == 2 and len(lines) == 1 and "reads other features than" in lines[0]
    code, _, lines = call(compress, tiny_run, tiny_run, "--out", tmp_path / "out", "--prune", "0")
    assert code == 2 and len(lines) == 1 and "ensemble of teachers for --distil" in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_changed(tiny_run, tmp_path, call):
    (tmp_path / "mine").write_text("mine")
    code, _, lines = call(compress, tiny_run, "--out", tmp_path, "--prune", "1")
    assert code == 2 and len(lines) == 1 and f"--out {tmp_path} exists" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_missing_data_is_reported_in_one_line(tiny_run, tmp_path, call):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    described = json.loads((moved / "model.json").read_text())
    described["config"]["data"] |= {"name": "folder", "root": str(tmp_path / "nowhere")}
    (moved / "model.json").write_text(json.dumps(described))
    code, _, lines = call(compress, moved, "--out", tmp_path / "out", "--prune", "1")
    assert code == 2 and len(lines) == 1 and "nowhere" in lines[0]
    assert not (tmp_path / "out").exists()
