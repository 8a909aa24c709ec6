"""The routing rules in the training loop: updates of a step, and reports of an epoch."""

from functools import partial

import pytest
import torch
import trainer_helpers

from data.datasets import DataConfig, load_splits
from model.routers import RouterConfig


@pytest.fixture(scope="module")
def digits():
    return load_splits(DataConfig(name="digits", max_per_class=20))


def train(path, digits, monkeypatch, **router):
    monkeypatch.setattr(trainer_helpers, "RouterConfig", partial(RouterConfig, **router))
    trainer = trainer_helpers.make_trainer(path, digits, epochs=3)
    trainer.fit()
    return trainer, trainer.run.history()


def test_the_bias_moves_once_per_step_after_warm_up_and_is_stored_with_the_average(tmp_path, digits, monkeypatch):
    trainer, _ = train(tmp_path, digits, monkeypatch, kind="deepseek", bias_rate=0.01)
    moved_E = trainer.model.moe.router.bias_E
    learned_steps = trainer.step - 6  # of warm-up
    assert learned_steps > 0 and 0 < moved_E.abs().max() <= 0.01 * learned_steps + 1e-6
    assert torch.allclose(moved_E / 0.01, (moved_E / 0.01).round(), atol=1e-3)
    state = trainer.state_dict()
    assert torch.equal(state["model"]["moe.router.bias_E"], moved_E)
    assert not torch.equal(state["ema"]["moe.router.bias_E"], moved_E)


def test_an_epoch_reports_floors_and_drops(tmp_path, digits, monkeypatch):
    _, history = train(tmp_path, digits, monkeypatch, kind="vmoe", capacity_factor=0.5)
    last = history[-1]
    assert last["loss_auxiliary_floor/switch"] == 1.0
    assert 0.9 < last["loss_auxiliary/switch"] < 2.0
    # Half of the places that all choices need, each expert's rounded up.
    assert 0.4 < last["balance/drop_rate"] < 0.7
    assert sum(last[f"expert_load/expert_{e}"] for e in range(3)) == pytest.approx(1.0)


def test_expert_choice_reports_the_samples_that_no_expert_took(tmp_path, digits, monkeypatch):
    trainer, history = train(tmp_path, digits, monkeypatch, kind="expert_choice", top_k=1, capacity_factor=0.5)
    assert history[-1]["balance/drop_rate"] > 0.4
    assert [history[-1][f"expert_load/expert_{e}"] for e in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)
    assert (trainer.model.moe.router.threshold_E > 0).all()
