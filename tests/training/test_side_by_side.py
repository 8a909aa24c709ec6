"""Runs side by side: each is what it would be alone, with one CUDA graph for all, when stopped, and when one fails."""

import os
import signal
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from test_graph import ON_GPU, Pretended
from trainer_helpers import equal_states, make_trainer

from common.errors import Interrupted, UserError
from common.signals import stoppable
from storage.checkpoint import load_checkpoint
from training import graph, trainer
from training.side_by_side import Run, fit

PLAN = {"epochs": 3, "batch_size": 96, "router": {"kind": "noisy_topk", "warmup_steps": 2}, "save_every": 2}


def runs_of(folder, splits, seeds, **plan):
    return [Run(make_trainer(folder / str(seed), splits, seed=seed, **PLAN | plan)) for seed in seeds]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, splits):
    """A function from a seed, and changes of the plan, to a trainer that trained alone, and its result.

    graphed: whether the test replaces its steps by graphed ones, which may draw other random numbers.
    """

    @cache
    def trained(seed, graphed=False, **plan):
        one = make_trainer(tmp_path_factory.mktemp("alone"), splits, seed=seed, **PLAN | plan)
        return one, one.fit()

    return trained


def timeless(run):
    return [{k: v for k, v in line.items() if "speed" not in k} for line in run.history()]


def same(a, b):
    """Whether nested lists of tensors and plain values are equal."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same(one, other):
    """Two runs have the same weights, optimizers, counters, random numbers and lines."""
    states = [load_checkpoint(each.run.last) for each in (one, other)]
    for name in ("model", "ema"):
        assert equal_states(states[0][name], states[1][name])
    moments, others = ([list(each.values()) for each in state["optimizer"]["state"].values()] for state in states)
    assert moments and same(moments, others)
    assert same(*(list(state["random"].values()) for state in states))
    for key in ("epoch", "step", "best", "improved", "warned"):
        assert states[0][key] == states[1][key]
    assert timeless(one.run) == timeless(other.run) and timeless(one.run)


def test_each_run_is_what_it_would_be_alone(tmp_path, splits, alone, capsys):
    """With early stopping, after different numbers of epochs."""
    seeds, plan = (3, 0, 5), {"patience": 1, "epochs": 9}
    runs = runs_of(tmp_path, splits, seeds, **plan)
    found = fit(runs)
    assert "seed 5  epoch   2/" in capsys.readouterr().out
    for run, best, seed in zip(runs, found, seeds, strict=True):
        one, expected = alone(seed, **plan)
        assert_same(run.trainer, one)
        assert best["epoch"] == expected["epoch"] and equal_states(best["model"], expected["model"])
    assert len({run.trainer.epoch for run in runs}) > 1


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graphed steps on a CPU that stay eager."""
    Pretended(monkeypatch)
    monkeypatch.setattr(graph, "EAGER_STEPS", 10**9)
    monkeypatch.setattr(trainer, "worth_capturing", lambda *_: True)


def test_joint_steps_train_each_run_as_alone(tmp_path, splits, alone, eager_graphs, monkeypatch):
    taken = []
    branches = graph.JointStep._branches
    monkeypatch.setattr(
        graph.JointStep, "_branches", lambda self, kinds: taken.append(len(kinds)) or branches(self, kinds)
    )
    runs = runs_of(tmp_path, splits, (1, 2), batch_size=64)  # the last batch of an epoch is smaller
    fit(runs)
    per_epoch = len(splits.train) // 64
    assert taken == [2] * 3 * per_epoch and runs[0].trainer.steps_per_epoch == per_epoch + 1
    for run, seed in zip(runs, (1, 2), strict=True):
        assert_same(run.trainer, alone(seed, graphed=True, batch_size=64)[0])


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_saves_every_run_and_each_continues_alone(tmp_path, splits, alone, step):
    runs = runs_of(tmp_path, splits, (0, 1))
    train_batch = runs[0].trainer._train_batch

    def signalled(*arguments):
        train_batch(*arguments)
        if runs[0].trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    runs[0].trainer._train_batch = signalled
    with pytest.raises(Interrupted) as caught, stoppable():
        fit(runs)
    assert caught.value.exit_code == 143
    for seed in (0, 1):
        assert load_checkpoint(runs[seed].trainer.run.last)["step"] == step
        runs[seed].trainer.tracker.close()
        resumed = make_trainer(tmp_path / str(seed), splits, resume=True, seed=seed, **PLAN)
        resumed.fit()
        one, _ = alone(seed)
        assert equal_states(resumed.model.state_dict(), one.model.state_dict())
        assert equal_states(resumed.ema.module.state_dict(), one.ema.module.state_dict())


@pytest.mark.parametrize("joint", [False, True])
def test_a_run_that_fails_leaves_the_others_with_their_last_step(tmp_path, splits, alone, request, joint):
    if joint:
        request.getfixturevalue("eager_graphs")
    runs = runs_of(tmp_path, splits, (0, 1, 2))
    train_batch = runs[1].trainer._train_batch

    def failed(*arguments):
        if runs[1].trainer.step == 4:
            raise UserError("the task loss is not finite")
        train_batch(*arguments)

    runs[1].trainer._train_batch = failed
    with pytest.raises(UserError, match="not finite"):
        fit(runs)
    # The third run had no turn yet after the second one's; joint steps were taken before all turns.
    assert [load_checkpoint(run.trainer.run.last)["step"] for run in runs] == [5, 3, 5 if joint else 4]
    runs[2].trainer.tracker.close()
    resumed = make_trainer(tmp_path / "2", splits, resume=True, seed=2, **PLAN)
    resumed.fit()
    assert_same(resumed, alone(2, graphed=joint)[0])


def test_a_joint_step_that_fails_saves_no_weights_between_two_steps(tmp_path, splits, alone, eager_graphs, monkeypatch):
    runs = runs_of(tmp_path, splits, (0, 1))
    branch = graph.JointStep._branch

    def failed(self, index, kind):
        if index == 1 and runs[1].trainer.step == 4:
            raise torch.OutOfMemoryError("out of memory")
        return branch(self, index, kind)

    monkeypatch.setattr(graph.JointStep, "_branch", failed)
    with pytest.raises(torch.OutOfMemoryError):
        fit(runs)
    # The first run has trained on its fifth batch, but has not counted it: the end of the first epoch is kept.
    assert [load_checkpoint(run.trainer.run.last)["step"] for run in runs] == [3, 3]
    runs[0].trainer.tracker.close()
    resumed = make_trainer(tmp_path / "0", splits, resume=True, seed=0, **PLAN)
    resumed.fit()
    assert_same(resumed, alone(0, graphed=True)[0])


def test_turns_that_may_write_a_checkpoint_have_all_random_numbers(tmp_path, splits):
    (run,), turns = runs_of(tmp_path, splits, (0,)), []
    run.numbers = SimpleNamespace(
        all=lambda: turns.append("all") or nullcontext(), of_steps=lambda: turns.append("steps") or nullcontext()
    )
    assert run.trainer.steps_per_epoch == 3
    for last in (False, False, True, False, False):
        assert run.advance(alone=last)
    # The first, within an epoch, alone, its end, within the next.
    assert turns == ["all", "steps", "all", "all", "steps"]
    run.close()


@ON_GPU
def test_captured_steps_side_by_side_train_like_those_of_single_runs(tmp_path, splits, alone):
    """The first run ends before the others, whose steps are then captured again."""
    epochs, plan = {1: 4, 2: 6, 3: 6}, {"device": torch.device("cuda", 0), "batch_size": 64}
    runs = [run for seed, number in epochs.items() for run in runs_of(tmp_path, splits, [seed], epochs=number, **plan)]
    fit(runs)
    for run, (seed, number) in zip(runs, epochs.items(), strict=True):
        one, _ = alone(seed, epochs=number, **plan)
        together, single = (load_checkpoint(each.run.last) for each in (run.trainer, one))
        assert isinstance(run.trainer.train_step, graph.GraphedStep) and together["step"] == single["step"]
        assert torch.equal(together["random"]["cuda"][0], single["random"]["cuda"][0])
        for name, value in single["model"].items():
            assert torch.allclose(value.float(), together["model"][name].float(), rtol=1e-2, atol=1e-4), name
