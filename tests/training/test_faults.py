"""Real faults: full and read-only disks, numbers that are not finite, gates that collapse."""

import json
import math
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_a_fork
from trainer_helpers import equal_states, make_trainer

from common.errors import EnvironmentFault, UserError
from common.files import write_json
from config.optim import OptimConfig
from model.balance import BalanceConfig
from model.routers import RouterConfig, build_router
from storage.checkpoint import load_checkpoint, save_checkpoint
from storage.folder import RunFolder
from training.health import RoutingWatch


# Disks
def test_a_full_disk_ends_training_and_reports_what_was_kept(tmp_path, splits):
    trainer = make_trainer(tmp_path / "run", splits)
    trainer._out_of_patience = lambda: trainer.epoch == 2
    trainer.fit()
    kept = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()

    def fill():
        trainer._out_of_patience = lambda: False
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # every write past it fails, as on a full disk
        trainer.fit()

    code, line = in_a_fork(fill)
    assert code == 1
    assert "could not be written: " in line and f"kept: {tmp_path}/run/checkpoints/last.pt of epoch 2" in line
    assert line.count("error:") == 1 and "Traceback" not in line
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == kept
    assert not list(tmp_path.rglob("*.partial"))


def test_no_space_left_is_reported_with_the_path_and_what_is_kept(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1, "weights": torch.zeros(3)})
    before = path.read_bytes()
    full = path.with_name(f".last.pt.{os.getpid()}.partial")
    full.symlink_to("/dev/full")  # every write to it gives ENOSPC
    with pytest.raises(
        EnvironmentFault, match=r"last\.pt could not be written: No space left.*kept: \S*last\.pt, unchanged"
    ):
        save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(100_000)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_read_only_folder_is_named():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o555)

        def write():
            if os.geteuid() == 0:  # to whom nothing is read-only
                os.setgid(65534)
                os.setuid(65534)
            for attempt in (
                lambda: RunFolder.create(folder / "run", "test"),
                lambda: write_json(folder / "model.json", {}),
            ):
                with pytest.raises(EnvironmentFault, match="Permission denied") as caught:
                    attempt()
                assert str(folder) in str(caught.value)
            save_checkpoint(folder / "last.pt", {})

        code, line = in_a_fork(write)
        assert code == 1 and line.count("\n") == 1
        assert f"{folder}/last.pt could not be written: Permission denied; kept: none yet" in line
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# Numbers
def poison(trainer, what):
    """Make a number overflow in the seventh step, the second of the second epoch. Returns the weights before it."""
    before = {}
    train_batch = trainer._train_batch

    @torch.no_grad()
    def poisoned(batch, share, progress):
        if trainer.step == 6:
            if what == "output of the backbone":
                batch = batch._replace(features=batch.features.clone())
                batch.features[3, 5] = math.inf
            elif what == "task loss":
                trainer.model.moe.experts[0][0].weight[0, 0] = math.nan
            elif what == "auxiliary loss z_loss":
                trainer.model.moe.router.gate.bias.fill_(1e30)
            else:
                trainer.model.neck.norm.weight.register_hook(lambda gradient: gradient * math.nan)
            before.update({key: value.clone() for key, value in trainer.model.named_parameters()})
        with torch.enable_grad():
            train_batch(batch, share, progress)

    trainer._train_batch = poisoned
    return before


@pytest.mark.parametrize("what", ["output of the backbone", "task loss", "auxiliary loss z_loss", "gradient"])
def test_a_number_that_is_not_finite_ends_training_within_its_step(tmp_path, splits, what):
    trainer = make_trainer(tmp_path, splits, balance=BalanceConfig(z_loss=1e-3), ema_decay=0.0)
    before = poison(trainer, what)
    with pytest.raises(UserError, match=rf"the {what} is not finite at step 7, in epoch 2: .*last\.pt of epoch 1\)"):
        trainer.fit()
    assert trainer.step == 6
    for key, value in trainer.model.named_parameters():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())
    (line,) = trainer.run.history()
    assert line["epoch"] == 1 and all(value is not None and math.isfinite(value) for value in line.values())
    assert load_checkpoint(trainer.run.last)["epoch"] == 1


def test_without_waiting_the_weights_stay_unchanged_and_the_step_is_named(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, ema_decay=0.0)
    step = trainer.train_step
    step.checks_each_step = False  # as on a GPU, whose fused optimizer the CPU has as well
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    seen = []
    batches = trainer.bank.batches

    def poisoned_batches(split, *arguments, **options):
        for features, labels_B in batches(split, *arguments, **options):
            if split == "train":
                seen.append({k: v.clone() for k, v in trainer.model.named_parameters()})
            bad = split == "train" and len(seen) == 8
            yield features * (math.nan if bad else 1), labels_B

    trainer.bank.batches = poisoned_batches
    with pytest.raises(UserError, match=r"the output of the backbone is not finite at step 8"):
        trainer.fit()
    assert len(seen) == 10  # to the end of the epoch, where it is noticed
    assert not equal_states(seen[6], seen[7])
    assert equal_states(seen[7], seen[8]) and equal_states(seen[7], seen[9])
    assert equal_states(seen[7], dict(trainer.model.named_parameters()))
    assert len(trainer.run.history()) == 1


def test_collapse_and_unused_experts_are_reported_once_with_the_remedy(capsys):
    watch = RoutingWatch(build_router(RouterConfig(), 8, 4), BalanceConfig(switch=0.01), 500)
    usages = ([5, 5, 5, 5], [90, 1, 90, 90], [90, 0, 90, 90], [300, 2, 2, 300], [0, 9, 0, 9], [9, 0, 0, 9])
    for epoch, usage in enumerate(usages, start=1):
        watch.check(np.array(usage), epoch, "training")
    remedy = "; set --router.bias_rate 0.001, or raise --balance.switch (now 0.01), by ten times or more, or raise "
    remedy += "--router.warmup_steps (now 500)"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: expert 1 received 0.4 % of the training assignments of epoch 2{remedy}",
        f"warning: expert 2 received 0.3 % of the training assignments of epoch 4{remedy}",
        f"warning: routing has collapsed: all training images of epoch 5 went to experts 1 and 3{remedy}",
    ]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"kind": "switch", "top_k": 1, "norm": "none"}, "raise --balance.switch .* or set --router.norm batch"),
        ({"kind": "deepseek"}, r"raise --router.bias_rate \(now 0.001\)"),
        ({"kind": "hash"}, "this rule is fixed, so use fewer --experts.sizes"),
    ],
)
def test_the_remedy_for_hardly_used_experts_is_available_in_the_rule(capsys, options, remedy):
    config = RouterConfig(**options)
    watch = RoutingWatch(build_router(config, 8, 4), BalanceConfig(), config.random_steps)
    watch.check(np.array([0.6, 0.395, 0.004, 0.001]), 3, "validation")
    (line,) = capsys.readouterr().err.splitlines()
    assert "experts 2 and 3 received at most 0.4 % each of the validation assignments of epoch 3; " in line
    assert re.search(remedy, line), line


def test_a_target_load_below_one_percent_gives_no_warning(capsys):
    router = build_router(RouterConfig(top_k=1, target_load=[0.9, 0.095, 0.005]), 8, 3)
    RoutingWatch(router, BalanceConfig(), 0).check(np.array([0.9, 0.095, 0.005]), 1, "training")
    assert capsys.readouterr().err == ""


def test_a_gate_collapsed_without_its_noise_is_noticed_on_the_validation_images(tmp_path, splits, capsys):
    trainer = make_trainer(tmp_path, splits, epochs=4, optim=OptimConfig(lr=1e-9, warmup_steps=0))
    router = trainer.model.moe.router
    with torch.no_grad():
        for weight in (router.gate.weight, router.noise.weight):  # noise of softplus(0) = 0.69
            weight.zero_()
        router.gate.bias.copy_(torch.tensor([0.2, 0.1, 0.0]))
    trainer.ema.module.load_state_dict(trainer.model.state_dict())
    trainer.fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(lines) == 1
    assert "routing has collapsed: all validation images of epoch 3 went to experts 0 and 1" in lines[0]


def test_a_collapsed_gate_is_noticed_in_training_and_not_again_after_resuming(tmp_path, splits, capsys):
    optim = OptimConfig(lr=1e-9, warmup_steps=0)
    trainer = make_trainer(tmp_path, splits, optim=optim, batch_size=48, epochs=3)
    with torch.no_grad():
        trainer.model.moe.router.gate.bias.copy_(torch.tensor([50.0, 40.0, 0.0]))
    trainer._out_of_patience = lambda: trainer.epoch == 2
    trainer.fit()
    assert "routing has collapsed: all training images of epoch 2 went to experts 0 and 1" in capsys.readouterr().err
    make_trainer(tmp_path, splits, optim=optim, batch_size=48, epochs=3, resume=True).fit()
    assert "collapsed" not in capsys.readouterr().err


# The same seed
def test_epochs_do_not_depend_on_the_extraction_of_features(tmp_path, splits, monkeypatch):
    states = []
    for name, threads in (("alone", 1), ("together", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            patch.setattr(torch, "set_num_threads", lambda count: None)
            trainer = make_trainer(tmp_path / name, splits, epochs=2)
            trainer.fit()
            states.append(trainer.model.state_dict())
    assert equal_states(*states)


def test_metrics_contain_no_nan(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, epochs=2)
    trainer.tracker.scalars({"loss/train": math.nan, "loss/validation": math.inf}, step=1, epoch=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss/train"] is None
