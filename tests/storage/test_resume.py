"""Resume is exact: kills, signals and corrupt files, compared with an uninterrupted run."""

import json
import os
import re
import shutil
import signal
import threading
import time

import crash_loop
import pytest
import torch
from conftest import import_lazy_modules, in_a_fork, mostly_slow, running_program
from trainer_helpers import equal_states, make_trainer

import train
from common.errors import Interrupted, UserError, exit_code_of
from common.signals import defer_signals, stoppable
from config.features import FeaturesConfig
from data.augment import AugmentConfig
from features.bank import FeatureBank
from model.routers import ROUTERS
from storage.checkpoint import load_checkpoint, previous, save_checkpoint
from storage.folder import RunFolder
from storage.resume import best_kept, metrics_step

CPU = torch.device("cpu")
TINY = [
    *("--config", "configs/digits.yaml", "--data.max_per_class", "12", "--device", "cpu"),
    *("--backbone.features", "[cls:0]", "--neck.kind", "pooled", "--router.warmup_steps", "5"),
    *("--train.batch_size", "16", "--optim.schedule", "constant"),
]


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    import_lazy_modules()
    found = tmp_path / "seen.json"
    code, said = in_a_fork(lambda: found.write_text(json.dumps(crash_loop.main(tmp_path, 10, 7))))
    assert code == 0, said
    seen = json.loads(found.read_text())
    assert seen["killed"] == 10
    assert seen["equal"] and seen["twins_equal"] and seen["longer"]
    assert 0 <= seen["most_epochs_lost"] <= 3  # train.save_every


def timeless(run):
    return [{k: v for k, v in line.items() if "speed" not in k} for line in run.history()]


def stop_after(trainer, step):
    """Train until SIGTERM arrives in the middle of a step, which is then finished."""
    train_batch = trainer._train_batch

    def signalled(*arguments):
        train_batch(*arguments)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_batch = signalled
    with pytest.raises(Interrupted) as caught, stoppable():
        trainer.fit()
    trainer.tracker.close()
    assert caught.value.exit_code == 143


def assert_resumes(path, splits, whole, **plan):
    """Continue with the trainer in `path`, and reach the same bits as `whole`, the uninterrupted run."""
    resumed = make_trainer(path, splits, resume=True, **plan)
    resumed.best = best_kept(resumed.run, resumed_config(resumed), load_checkpoint(resumed.run.last))
    resumed.fit()
    resumed.tracker.close()
    for a, b in ((whole.model, resumed.model), (whole.ema.module, resumed.ema.module)):
        assert equal_states(a.state_dict(), b.state_dict())
        assert equal_states(dict(a.named_buffers()), dict(b.named_buffers()))  # those that no checkpoint holds too
    assert (whole.best, timeless(whole.run)) == (resumed.best, timeless(resumed.run))


@pytest.mark.slow
def test_a_signal_at_any_step_resumes_at_that_step(tmp_path, splits):
    plan = {"save_every": 2, "epochs": 3, "batch_size": 96}  # three epochs of three steps
    whole = make_trainer(tmp_path / "whole", splits, **plan)
    whole.fit()
    for step in range(1, 10):
        path = tmp_path / str(step)
        part = make_trainer(path, splits, **plan)
        stop_after(part, step)
        state = load_checkpoint(part.run.last)
        assert (state["step"], state["progress"]["batches"]) == (step, (step - 1) % 3 + 1)
        assert_resumes(path, splits, whole, **plan)


@pytest.mark.parametrize("kind", mostly_slow(ROUTERS, ["noisy_topk", "deepseek"]))
def test_every_routing_rule_resumes_in_the_middle_of_warm_up_and_after_it(tmp_path, splits, kind):
    options = {"switch": {"top_k": 1}, "hierarchical": {"groups": 3, "top_groups": 2}}.get(kind, {})
    plan = {"epochs": 2, "batch_size": 96, "router": {"kind": kind, "warmup_steps": 2, **options}}  # 3 steps an epoch
    whole = make_trainer(tmp_path / "whole", splits, **plan)
    whole.fit()
    stop_after(make_trainer(tmp_path / "part", splits, **plan), 1)
    stop_after(make_trainer(tmp_path / "part", splits, resume=True, **plan), 4)
    assert_resumes(tmp_path / "part", splits, whole, **plan)


def resumed_config(trainer):
    """The part of a Config that best_kept reads."""
    trainer.identity["config"] = {"train": {"epochs": trainer.config.epochs}}
    return type("Config", (), {"train": trainer.config})()


def test_a_signal_waits_for_a_critical_section_and_a_second_one_does_not():
    done = []
    with pytest.raises(Interrupted) as caught, stoppable():
        with defer_signals, defer_signals:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")
        done.append("never")
    assert done == ["whole"] and caught.value.exit_code == 130
    pid = os.fork()
    if pid == 0:
        try:
            with stoppable(), defer_signals:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        finally:
            os._exit(0)  # the second signal has not ended it
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143


def test_signals_that_the_caller_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_an_extraction_at_once(splits, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    sent, done, release = [], [], threading.Event()

    def slow(images):
        if not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), sent[0])
        release.wait(60)
        done.append(images)
        return images.float().flatten(1)

    bank = FeatureBank(splits, slow, AugmentConfig(flip=False, crop=0), FeaturesConfig(batch_size=16), CPU)
    with pytest.raises(Interrupted), stoppable():
        next(bank.batches("train", 16))
    assert sent and not done, "the batch on its way was waited for"
    release.set()


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone"])
def test_a_truncated_checkpoint_is_replaced_by_the_previous_one(tmp_path, splits, capsys, harm):
    whole = make_trainer(tmp_path / "run", splits)
    whole.fit()
    whole.tracker.close()
    last = whole.run.last
    content = bytearray(last.read_bytes())
    for position in range(len(content) // 2, len(content) // 2 + 200):  # more than the padding between two tensors
        content[position] ^= 0x10
    if harm == "gone":  # killed between the two renames
        last.unlink()
    else:
        last.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[harm])
    capsys.readouterr()  # progress of the training, on a slow machine
    resumed = make_trainer(tmp_path / "run", splits, resume=True)
    assert resumed.epoch == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "last.pt" in line and "continuing with" in line and "of epoch 3" in line
    resumed.fit()
    assert equal_states(whole.model.state_dict(), resumed.model.state_dict())
    assert timeless(whole.run) == timeless(resumed.run)


def test_without_an_intact_checkpoint_there_is_one_line(tmp_path):
    path = tmp_path / "last.pt"
    for file in (path, previous(path)):
        file.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"last\.previous\.pt is truncated or not a checkpoint"):
        load_checkpoint(path)


def test_the_best_epoch_is_the_one_with_stored_weights(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    identity = {
        "config": {"train": {"epochs": 9}},
        "backbone": {"name": "", "fingerprint": ""},
        "data": {"train": "", "validation": "", "test": ""},
        "class_names": [],
        "feature_shape": [1],
        "model": {},
    }
    state = {**identity, "step": 40, "epoch": 4, "progress": None, "best": {"epoch": 3, "macro_f1": 0.5}}

    def planned(epochs):
        return type("Config", (), {"train": type("Train", (), {"epochs": epochs})})()

    save_checkpoint(run.best, {**identity, "epoch": 2, "macro_f1": 0.4})
    assert best_kept(run, planned(9), state) == {"epoch": 2, "macro_f1": 0.4}  # that of epoch 3 was truncated
    save_checkpoint(run.best, {**identity, "epoch": 6, "macro_f1": 0.7})
    assert best_kept(run, planned(9), state)["epoch"] == 3  # epochs 5 and 6 will be the same again
    assert best_kept(run, planned(5), state)["epoch"] == 6  # they will not
    assert (metrics_step(None), metrics_step(state)) == (0, 40)
    assert metrics_step({**state, "progress": {"batches": 7}}) == 33


@pytest.mark.slow
def test_the_program_itself_is_interrupted_resumed_and_finished(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = [*TINY, "--train.epochs", "100000", "--run_dir", run, "--tracking", "offline"]
    environment = {**os.environ, "CLEARML_CACHE_DIR": str(tmp_path / "clearml")}
    with running_program("train.py", *words, env=environment, stdout=-1, stderr=-1) as process:
        for line in process.stdout:
            if line.startswith("epoch   7"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if "clearml" not in line.lower() and not line.startswith("warning")]
    assert lines[0].startswith("finishing the step") or lines[0].startswith("python train.py --resume")
    assert lines[-1] == "interrupted by SIGINT"
    assert "offline session" in output  # the tracker was closed
    kept = load_checkpoint(RunFolder(run).last)
    assert kept["epoch"] >= 7
    stop = str(kept["epoch"])
    arguments = ["--resume", str(run), "--train.epochs", stop, "--tracking", "none"]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    assert exit_code_of(train.main) == 0
    output = capsys.readouterr().out
    assert "resuming" in output and "run folder" in output
    assert not list(run.rglob("*.partial"))
    epochs = [line["epoch"] for line in RunFolder(run).history()]
    assert epochs == list(range(1, len(epochs) + 1))
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(run)])
    assert exit_code_of(train.main) == 0
    assert re.search(r"is finished: raise --train\.epochs", capsys.readouterr().out)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(moved), "--router.top_k", "3"])
    assert exit_code_of(train.main) == 2
    assert "cannot change router.top_k from 2 to 3" in capsys.readouterr().err
