"""Mistakes that the options, class names or images show are reported before a run has a folder or a task, and those
that the options alone show, before anything is loaded."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import compress
import evaluate
import train
from assembly import seeds
from assembly.start import start_tracking
from common.errors import UserError, exit_code_of
from config.command_line import parse_command_line
from storage.checkpoint import load_checkpoint, save_checkpoint, seed_everything
from storage.folder import RunFolder
from tracking.tracker import silent_tracker


@pytest.fixture
def call(monkeypatch, capfd):
    """Run a program here: exit code, and lines of standard error."""
    monkeypatch.chdir(ROOT)

    def run(program, *words):
        monkeypatch.setattr("sys.argv", [program.__name__ + ".py", *map(str, words)])
        return exit_code_of(program.main), capfd.readouterr().err.splitlines()

    return run


@pytest.fixture
def untouched(monkeypatch):
    """No run folder is created or claimed, and no tracker is opened."""
    for name in ("create", "claimed"):
        monkeypatch.setattr(RunFolder, name, lambda *_: pytest.fail("a run folder was touched"))
    monkeypatch.setattr("assembly.start.open_tracker", lambda *_, **__: pytest.fail("tracking was opened"))


@pytest.fixture
def unread(monkeypatch, untouched):
    """The pieces of work that were begun."""
    begun = []
    monkeypatch.setattr("assembly.pipeline.read_images", lambda config: begun.append("images"))
    monkeypatch.setattr("assembly.pipeline.load_backbone", lambda *_: begun.append("weights"))
    return begun


def no_server(monkeypatch):
    problem = UserError("no ClearML server is configured")
    monkeypatch.setattr("tracking.tracker.server_problem", lambda: problem)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backbone.name vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("--backbone.name resnet18.a1_in1k", "is not a ViT"),
        ("--backbone.name vit_small_patch16_224.none", "names weights that timm does not have"),
        ("--backbone.name vit_small_patch16_224 --backbone.weights nowhere.safetensors", "is not a file"),
        ("--backbone.features [cls:8]", "names block 8: this ViT has blocks 0 to 7"),
        ("--experts.place blocks --experts.kind adapter --experts.blocks [9]", "experts.blocks names block 9"),
        ("--neck.kind tokens", "neck.kind tokens reads"),
        ("--parallel.experts 2", "parallel.experts 2 needs 2 processes"),
        ("--tracking clearml", "no ClearML server is configured"),
        ("--run_dir README.md/run", "README.md/run/checkpoints cannot be created in"),
    ],
)
def test_a_mistake_in_the_options_is_found_before_loading(call, unread, monkeypatch, words, message):
    no_server(monkeypatch)
    code, lines = call(train, *TINY.split(), "--tracking", "none", *words.split())
    assert code in (1, 2) and message in lines[-1] and unread == []


def test_a_damaged_run_to_start_from_is_found_before_loading(call, unread, tiny_run, tmp_path):
    damaged = shutil.copytree(tiny_run, tmp_path / "damaged")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    code, lines = call(train, "--init", damaged, "--tracking", "none")
    assert code in (1, 2) and "model.safetensors is corrupt" in lines[-1] and unread == []


def test_frozen_parts_that_leave_nothing_to_train_touch_nothing(call, untouched, tiny_run):
    code, lines = call(train, "--init", tiny_run, "--freeze", "neck,router,experts,shared,head")
    assert code == 2 and lines[-1].startswith("error: freeze neck,router,experts,shared,head leaves nothing to train")


def test_a_disk_that_is_too_small_for_the_features_touches_nothing(call, untouched, tmp_path, monkeypatch):
    monkeypatch.setattr("features.cache.FeatureCache.free", lambda cache: 1000)
    code, lines = call(train, *TINY.split(), "--features.cache_dir", tmp_path / "features")
    assert code == 1 and "but only 1 kB are free" in lines[-1]


def test_a_frozen_head_without_a_shared_class_touches_nothing(call, untouched, tiny_run, tmp_path):
    numbers = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(20):
            image = numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    words = ["--init", tiny_run, "--data.name", "folder", "--data.root", tmp_path, "--train.batch_size", "4"]
    code, lines = call(train, *words, "--freeze", "head")
    assert code == 2 and "freeze head needs a class that the run of init has too" in lines[-1]


def test_another_backbone_than_that_of_the_run_is_found_before_loading(call, unread, tiny_run):
    words = ["--backbone.name", "vit_small_patch16_224", "--backbone.pretrained", "false", "--tracking", "none"]
    code, lines = call(train, "--init", tiny_run, *words)
    assert code == 2 and "reads features of shape [384], but those here have [768]" in lines[-1] and unread == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "0", "validation": "0", "test": "0"}}, "was trained on other data"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit the model of its configuration"),
        ({}, "is distilled from .*nowhere, which cannot be opened"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_unchanged(call, untouched, tiny_run, tmp_path, change, message):
    run = RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))
    save_checkpoint(run.last, load_checkpoint(run.last) | change, "none")
    if not change:
        run.teachers.write_text(json.dumps({"runs": [str(tmp_path / "nowhere")], "temperature": 2, "weight": 0.5}))
    before = run.metrics.read_bytes(), run.results.read_bytes()
    code, lines = call(train, "--resume", run.path, "--train.epochs", "5")
    assert code in (1, 2) and re.search(message, lines[-1])
    assert (run.metrics.read_bytes(), run.results.read_bytes()) == before


def test_a_seed_that_cannot_be_continued_is_found_before_the_first_is_trained(tmp_path, monkeypatch):
    words = ["--config", "configs/digits.yaml", "--run_dir", str(tmp_path / "few"), "--seeds", "2"]
    (tmp_path / "few-seed1").mkdir()
    (tmp_path / "few-seed1" / "model.json").write_text("{}")
    monkeypatch.setattr(seeds, "load_inputs", lambda config: SimpleNamespace(splits=None, backbone=None, device=None))
    monkeypatch.setattr(seeds, "planned", lambda config, inputs: config)
    monkeypatch.setattr(seeds, "build_bank", lambda *_: None)
    with pytest.raises(UserError, match="few-seed1 already holds a run"):
        seeds.train_seeds(parse_command_line(words), lambda *_: pytest.fail("training has begun"))


def test_tracking_does_not_change_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("assembly.start.open_tracker", lambda *_, **__: seed_everything(99) or silent_tracker())
    seed_everything(3)
    expected = torch.rand(2), np.random.rand(2)
    seed_everything(3)
    config = parse_command_line(TINY.split()).config
    inputs = SimpleNamespace(origin=None, device=torch.device("cpu"))
    with start_tracking(config, RunFolder(tmp_path), None, inputs):
        assert torch.equal(torch.rand(2), expected[0]) and np.array_equal(np.random.rand(2), expected[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quantise fp8", "--quantise fp8 does not work on cpu"),
        ("--prune 0 --tracking clearml", "no ClearML server is configured"),
        ("nowhere --distil dense", "nowhere is not a folder"),
    ],
)
def test_an_impossible_compression_loads_no_run(call, untouched, tiny_run, tmp_path, monkeypatch, words, message):
    def lacks(*_):
        raise RuntimeError("no kernel")

    no_server(monkeypatch)
    monkeypatch.setattr("compression.quantise.unpack", lacks)
    monkeypatch.setattr("assembly.compressing.open_run", lambda *_: pytest.fail("a run was loaded"))
    code, lines = call(compress, tiny_run, *words.split(), "--out", tmp_path / "out")
    assert code == 2 and message in lines[-1] and not (tmp_path / "out").exists()


def test_an_evaluation_without_its_server_loads_nothing(call, tiny_run, monkeypatch):
    no_server(monkeypatch)
    monkeypatch.setattr("assembly.scoring.open_run", lambda *_: pytest.fail("a run was loaded"))
    code, lines = call(evaluate, tiny_run, "--tracking", "clearml")
    assert code == 2 and lines == ["error: no ClearML server is configured"]
