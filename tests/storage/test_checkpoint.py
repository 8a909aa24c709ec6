"""The parts of a checkpoint separately: random states, the optimizer, and allowed changes of a resumed run."""

import random

import numpy as np
import pytest
import torch
from trainer_helpers import IDENTITY

from common.errors import UserError
from config.config import Config
from storage.checkpoint import (
    check_inputs,
    load_optimizer,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_everything,
)
from storage.folder import RunFolder
from storage.resume import finished, load_resumable, metrics_step

CPU = torch.device("cpu")


def draws():
    """A number of every generator that a run uses; NumPy's and Python's have a normal draw in store."""
    return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)


def test_a_seed_and_a_stored_state_decide_every_generator():
    seed_everything(7)
    first = draws()
    stored = random_state(CPU)
    second = draws()
    restore_random_state(stored, CPU)
    third = draws()
    seed_everything(7)
    again = draws()
    seed_everything(8)
    other = draws()
    for a, b, c, d, e in zip(first, again, second, third, other, strict=True):
        assert a == b and c == d and a != c and a != e


def test_moments_and_learning_rate_come_from_the_checkpoint_and_other_settings_from_the_configuration():
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = torch.optim.AdamW(layer.parameters(), lr=0.3, weight_decay=0.1)
    before.step()
    after = torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=0.2)
    load_optimizer(after, before.state_dict())
    (group,) = after.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    for parameter in layer.parameters():
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])


def test_features_of_another_shape_are_rejected():
    with pytest.raises(UserError, match=r"reads features of shape \[192\], but the backbone gives \[8\]"):
        check_inputs(IDENTITY, {**IDENTITY, "feature_shape": [8]}, "best.pt")


def stored_run(tmp_path, **changes):
    """A run whose last checkpoint has the default configuration, and the checkpoint."""
    run = RunFolder.create(tmp_path / "run", "test")
    state = {
        **IDENTITY,
        "config": Config().to_dict(),
        "model": {},
        "optimizer": {"state": {}, "param_groups": [{}]},
        "epoch": 4,
        "step": 40,
        "best": {"epoch": 3, "macro_f1": 0.5},
        "improved": 3,
        "warned": [],
        "random": {},
        "progress": None,
        "threads": torch.get_num_threads(),
        **changes,
    }
    save_checkpoint(run.last, state)
    return run, state


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("optim", "lr", 0.5),
        ("optim", "weight_decay", 0.5),
        ("train", "batch_size", 7),
        ("train", "seed", 9),
        ("router", "temperature", 2.0),
        ("balance", "switch", 0.5),
        ("features", "views", 3),
    ],
)
def test_a_resumed_run_keeps_the_options_that_define_the_experiment(tmp_path, part, option, value):
    run, _ = stored_run(tmp_path)
    config = Config()
    assert load_resumable(run, config)["epoch"] == 4
    setattr(getattr(config, part), option, value)
    with pytest.raises(UserError, match=rf"cannot change {part}\.{option} from"):
        load_resumable(run, config)


def test_a_resumed_run_can_change_options_that_do_not_affect_results(tmp_path):
    run, _ = stored_run(tmp_path)
    config = Config()
    config.train.epochs, config.train.patience, config.train.graph = 99, 5, "off"
    config.features.batch_size, config.experts.dispatch = 7, "dense"
    assert load_resumable(run, config)["epoch"] == 4


def test_an_option_newer_than_the_run_has_its_default(tmp_path):
    before = Config().to_dict()
    del before["router"]["temperature"]
    run, _ = stored_run(tmp_path, config=before)
    config = Config()
    assert load_resumable(run, config)["epoch"] == 4
    config.router.temperature = 2.0
    with pytest.raises(UserError, match=r"cannot change router\.temperature from 1\.0 to 2\.0"):
        load_resumable(run, config)


def test_another_number_of_threads_is_reported(tmp_path, capsys):
    run, _ = stored_run(tmp_path, threads=torch.get_num_threads())
    load_resumable(run, Config())
    assert "threads" not in capsys.readouterr().err
    run, _ = stored_run(tmp_path / "other", threads=torch.get_num_threads() + 1)
    load_resumable(run, Config())
    assert "CPU threads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epochs", "patience", "progress", "expected"),
    [
        (4, 0, None, True),
        (5, 0, None, False),
        (9, 1, None, True),  # one epoch has passed since the last improvement
        (9, 2, None, False),
        (4, 0, {"batches": 3}, False),
    ],
)
def test_when_a_run_is_finished(tmp_path, epochs, patience, progress, expected):
    run, state = stored_run(tmp_path, progress=progress)
    config = Config()
    config.train.epochs, config.train.patience = epochs, patience
    assert not finished(run, config, state)  # not scored yet
    run.evaluation.mkdir()
    run.results.write_text("{}", encoding="utf-8")
    assert finished(run, config, state) == expected


def test_numbers_belong_to_the_end_of_the_last_complete_epoch(tmp_path):
    assert metrics_step(None) == 0
    assert metrics_step(stored_run(tmp_path)[1]) == 40
    assert metrics_step(stored_run(tmp_path / "other", progress={"batches": 3})[1]) == 37


def test_a_folder_with_a_model_and_no_checkpoint_contains_a_run(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    run.require_no_run()
    run.model.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="already holds a run"):
        run.require_no_run()


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    left = run.last.with_name(".last.pt.123.partial")
    left.write_bytes(b"half")
    with run.claimed():
        assert not left.exists()
