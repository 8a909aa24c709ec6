"""Faults caused for real: full and read-only disks, folders that go, numbers that are not finite, bad data."""

import json
import math
import multiprocessing
import os
import resource
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from crash_loop import OPTIONS, outcome, same
from PIL import Image
from safetensors import safe_open
from test_trainer import equal_states, make_trainer, splits  # noqa: F401, a fixture

import errors
import evaluate
import train
from data.datasets import DataConfig, ImageSet, load_splits
from data.feature_cache import FeatureCache
from data.image_file import read_picture
from engine import evaluation
from engine.checkpoint import export_model, load_checkpoint, save_checkpoint
from engine.config import Config, write_config
from engine.health import RoutingWatch
from engine.optim import OptimConfig
from engine.run_folder import RunFolder, write_json
from errors import EnvironmentFault, UserError, exit_code_of
from model.balance import BalanceConfig


def in_a_fork(function) -> tuple[int, str]:
    """Exit code and standard error of a function that runs as a program in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            code = exit_code_of(function)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# Disks


def test_a_disk_that_fills_up_ends_training_with_what_was_kept(tmp_path, splits):  # noqa: F811
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


def test_no_space_left_is_said_with_the_path_and_what_is_kept(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1, "weights": torch.zeros(3)})
    before = path.read_bytes()
    full = path.with_name(f".last.pt.{os.getpid()}.partial")
    full.symlink_to("/dev/full")  # every write to it gives ENOSPC
    with pytest.raises(
        EnvironmentFault, match=r"last\.pt could not be written: No space left.*kept: \S*last\.pt as it"
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


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_folder_that_is_removed_is_missed_at_the_end_of_the_epoch(tmp_path, splits, replaced):  # noqa: F811
    trainer = make_trainer(tmp_path / "run", splits)
    end_epoch = trainer._end_epoch

    def remove(values):
        if trainer.epoch == 2:
            shutil.rmtree(tmp_path / "run")
            if replaced:
                (tmp_path / "run").write_text("a file")
        end_epoch(values)

    trainer._end_epoch = remove
    with pytest.raises(EnvironmentFault, match=r"run folder \S*run was removed.*nothing of this run is kept there"):
        trainer.fit()
    assert trainer.epoch == 2
    assert replaced or not (tmp_path / "run").exists()  # and does not come back half empty
    if replaced:
        with pytest.raises(EnvironmentFault, match=r"cannot be made: (Not a directory|File exists)"):
            RunFolder.create(tmp_path / "run", "test")


def test_what_others_may_read_they_may_read(tmp_path, splits):  # noqa: F811
    trainer = make_trainer(tmp_path, splits, epochs=2)
    trainer.fit()
    export_model(trainer.run)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (trainer.run.weights, trainer.run.model)}
    assert modes["model.safetensors"] == modes["model.json"]


# Two runs at once


def test_runs_that_start_at_once_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pids = []
    for _ in range(8):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                for _ in range(5):
                    run = RunFolder.create(None, "test")
                    with run.claimed():
                        run.metrics.write_text("kept")
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert len(list((tmp_path / "runs").iterdir())) == 40


def test_a_run_folder_serves_one_process_at_a_time(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    litter = run.last.with_name(".last.pt.1.partial")
    litter.write_text("half")
    with run.claimed():
        assert not litter.exists()
        run.metrics.write_text("{}")

        def second():
            with RunFolder.create(tmp_path / "run", "test").claimed():
                pass

        code, line = in_a_fork(second)
        assert code == 2 and "is in use by another process" in line
        assert run.metrics.exists()  # the one that was refused has not touched what the first has written
    assert in_a_fork(second)[0] == 0


def _train(log, *arguments):
    """A program of its own, which waits for its threads as Python does at the end of one."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
    sys.argv = ["train.py", *map(str, arguments)]
    errors.leave(exit_code_of(train.main))


def test_two_runs_that_fill_one_feature_cache_end_with_the_same_bits(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, draft, features = context.Barrier(2), FeatureCache.draft, tmp_path / "features"

    def draft_together(cache, *arguments):
        barrier.wait(60)  # neither run has found this view
        return draft(cache, *arguments)

    monkeypatch.setattr(FeatureCache, "draft", draft_together)
    monkeypatch.setattr(evaluation, "draw", lambda *arguments: [])  # figures cost seconds
    monkeypatch.setattr(evaluation, "write_report", lambda *arguments: None)
    options = [*OPTIONS, "--train.epochs", 3, "--router.warmup_steps", 5, "--features.cache_dir", features]
    runs = [tmp_path / name for name in ("a", "b")]
    both = [context.Process(target=_train, args=(f"{run}.log", "--run_dir", run, *options)) for run in runs]
    for process in both:
        process.start()
    for process in both:
        process.join()
    said = [Path(f"{run}.log").read_text() for run in runs]
    assert [process.exitcode for process in both] == [0, 0], said
    assert not any("features: " in text for text in said), said  # nothing torn, altered, or not kept
    a, b = map(outcome, runs)
    assert same(a, b) and len(a["lines"]) == 3
    stored = sorted(features.iterdir())
    assert [path.name.rpartition("-")[0] for path in stored] == [
        "test-plain",
        "train-view0",
        "train-view1",
        "validation-plain",
    ]
    for path in stored:
        with safe_open(path, "pt") as file:
            key = json.loads(file.metadata()["key"])
        assert FeatureCache(features).load(key) is not None


def test_a_folder_that_cannot_be_used_is_told_before_any_work(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", "test")
    monkeypatch.setattr(train, "load_inputs", lambda config: pytest.fail("has begun to load"))

    def told(*words):
        monkeypatch.setattr("sys.argv", ["train.py", "--config", "configs/digits.yaml", *map(str, words)])
        return in_a_fork(train.main)

    with run.claimed():
        assert told("--run_dir", run.path) == (2, f"error: {busy(run)}\n")
        write_config(Config(), run.config)
        monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(run.path)])
        assert in_a_fork(train.main) == (2, f"error: {busy(run)}\n")
        write_json(run.model, {})
    code, line = told("--run_dir", run.path)
    assert code == 2 and "already holds a run" in line
    run.refuse_busy()  # the first look has claimed nothing
    with run.claimed(), pytest.raises(UserError, match="in use"):
        run.refuse_busy()


def busy(run):
    return f"{run.path} is in use by another process: wait for it, or choose another --run_dir"


@pytest.mark.parametrize("mine", [False, True])
def test_a_run_that_keeps_nothing_leaves_nothing(tmp_path, mine):
    path = tmp_path / "run"
    if mine:
        path.mkdir()
        (path / "notes.txt").write_text("not of the run")

    def fail():
        run = RunFolder.create(path, "test")
        with run.claimed():
            run.config.write_text("{}")
            run.metrics.write_text("")
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fail()
    assert [item.name for item in tmp_path.rglob("*")] == (["run", "notes.txt"] if mine else [])


# Numbers


def poison(trainer, what):
    """Make a number overflow in the seventh step, the second of the second epoch. Returns the weights before it."""
    before = {}
    train_batch = trainer._train_batch

    @torch.no_grad()
    def poisoned(features, labels_B, progress):
        if trainer.step == 6:
            if what == "output of the backbone":
                features = features.clone()
                features[3, 5] = math.inf
            elif what == "task loss":
                trainer.model.moe.experts[0][0].weight[0, 0] = math.nan
            elif what == "auxiliary loss z_loss":
                trainer.model.moe.router.gate.bias.fill_(1e30)
            else:
                trainer.model.neck.norm.weight.register_hook(lambda gradient: gradient * math.nan)
            before.update({key: value.clone() for key, value in trainer.model.named_parameters()})
        with torch.enable_grad():
            train_batch(features, labels_B, progress)

    trainer._train_batch = poisoned
    return before


@pytest.mark.parametrize("what", ["output of the backbone", "task loss", "auxiliary loss z_loss", "gradient"])
def test_a_number_that_is_not_finite_ends_training_within_its_step(tmp_path, splits, what):  # noqa: F811
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


def test_where_no_step_may_wait_the_weights_stay_as_they_were_and_the_step_is_named(tmp_path, splits):  # noqa: F811
    trainer = make_trainer(tmp_path, splits, ema_decay=0.0)
    step = trainer.train_step
    step.looks = False  # as on a GPU, whose fused optimizer the CPU has as well
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


def test_collapse_and_unused_experts_are_said_once_with_the_remedy(capsys):
    watch = RoutingWatch(2, BalanceConfig(switch=0.01))
    for epoch, usage in enumerate(([5, 5, 5, 5], [9, 0, 9, 9], [9, 0, 9, 9], [0, 9, 0, 9], [0, 9, 0, 9]), start=1):
        watch.look(torch.tensor(usage).numpy(), epoch)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: no sample of epoch 2 went to the expert(s) [1]; raise --balance.switch")
    assert lines[1].startswith("warning: routing has collapsed: in epoch 4 all samples went to the experts [1, 3]")


def test_a_collapsed_gate_is_noticed_while_training_and_not_again_after_a_resumption(tmp_path, splits, capsys):  # noqa: F811
    optim = OptimConfig(lr=1e-9, warmup_steps=0)
    trainer = make_trainer(tmp_path, splits, optim=optim, batch_size=48, epochs=3)
    with torch.no_grad():
        trainer.model.moe.router.gate.bias.copy_(torch.tensor([50.0, 40.0, 0.0]))
    trainer._out_of_patience = lambda: trainer.epoch == 2
    trainer.fit()
    assert "routing has collapsed: in epoch 2 all samples went to the experts [0, 1]" in capsys.readouterr().err
    make_trainer(tmp_path, splits, optim=optim, batch_size=48, epochs=3, resume=True).fit()
    assert "collapsed" not in capsys.readouterr().err


# Errors that nobody foresaw


def test_a_traceback_only_with_debug(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("sys.argv", ["train.py"])
    assert exit_code_of(fail) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "ZeroDivisionError" in line and "test_faults.py:" in line and "--debug" in line
    monkeypatch.setattr("sys.argv", ["train.py", "--debug"])
    assert exit_code_of(fail) == 1
    assert "Traceback" in capsys.readouterr().err
    for program in (train, evaluate):
        monkeypatch.setattr("sys.argv", ["program", "--debug", "--nonsense", "1"])
        assert exit_code_of(program.main) == 2
        assert "Traceback" in capsys.readouterr().err


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    for greedy in (lambda: torch.empty(2**55), lambda: bytearray(2**55)):
        assert exit_code_of(greedy) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: out of memory") and line.count("\n") == 1 and "--train.batch_size" in line


def test_a_system_error_names_its_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert exit_code_of((tmp_path / "none").read_text) == 1
    assert f"error: {tmp_path}/none: No such file or directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115, a terminal that takes nothing any more
    errors.say("lost")


def full_disk():
    return open("/dev/full", "w")


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(
    ("output", "words"),
    [(full_disk, "standard output cannot be written: No space"), (unread_pipe, "")],
)
def test_output_that_no_one_takes_ends_no_work_that_is_in_files(monkeypatch, capsys, tmp_path, output, words, lasting):
    def work():
        print("begun", flush=True)
        (tmp_path / "result").write_text("whole")
        print("done")

    with monkeypatch.context() as patch, output() as stream:
        patch.setattr("sys.argv", ["train.py"])
        patch.setattr(sys, "stdout", stream)
        assert exit_code_of(work, lasting) == 1
        assert sys.stdout is stream
        stream.flush()  # as Python does when it ends: nothing is left that could fail
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == bool(words)
    assert (tmp_path / "result").exists() == lasting


def test_buffered_lines_that_are_lost_at_the_end_are_an_error(monkeypatch, capsys):
    for main in (lambda: print("all"), lambda: evaluate.parse(["--help"])):
        with monkeypatch.context() as patch, open("/dev/full", "w") as stream:
            patch.setattr(sys, "stdout", stream)
            assert exit_code_of(main) == 1
        assert capsys.readouterr().err.count("standard output cannot be written") == 1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # closed before the program began
        assert exit_code_of(lambda: print("nothing")) == exit_code_of(lambda: evaluate.parse(["--help"])) == 0


# Data


def folder_of_images(root, counts):
    """ROOT/SPLIT/CLASS/N.png for {"SPLIT/CLASS": how many}."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(root / place / f"{index}.png")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train/a": 9}, "holds 1 class folder"),
        ({"train/a": 1}, "holds 1 class folder"),
        ({"train/a": 9, "train/b": 1}, "class 'b' has 1 image"),
        ({"train/a": 9, "train/b": 0}, "b holds no image"),
        ({"train/a": 3, "train/b": 3, "test/a": 2}, "data.validation 0.1 of 6 images cannot hold all 2 classes"),
        ({"train/a": 9, "train/b": 9, "val/a": 0}, "val has no image"),
        ({"train/a": 9, "train/b": 9, "test/c": 1}, "class folder 'c' that train/ does not have"),
    ],
)
def test_too_little_data_is_one_line(tmp_path, counts, words):
    folder_of_images(tmp_path, counts)
    with pytest.raises(UserError, match=words) as caught:
        load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))
    assert "\n" not in str(caught.value)


def test_a_class_that_a_split_lacks_is_said_before_training(tmp_path, capsys):
    folder_of_images(tmp_path, {"train/a": 9, "train/b": 9, "val/a": 2, "test/b": 2, "test/a": 1})
    load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the validation split has no image of 1 of the 2 classes ('b')" in line


def test_labels_out_of_range_are_refused():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for labels in ([0, 1, 2], [0, -1, 1], [0, 1]):
        with pytest.raises(UserError, match=r"labels|images"):
            ImageSet(images, torch.tensor(labels), ("a", "b"))


def test_images_that_cannot_be_read_are_counted_and_the_first_is_named(tmp_path):
    folder_of_images(tmp_path, {"train/a": 4, "train/b": 4})
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/b/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image .*\(2 of 8 files in"):
        load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))


def test_images_that_would_fill_the_memory_do_not(tmp_path):
    Image.new("L", (4, 60_000), 7).save(tmp_path / "thin.png")  # 224 x 3 million pixels if its width became 224
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_picture(tmp_path / "thin.png", 224).pixels_CHW.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    (tmp_path / "claim.ppm").write_bytes(b"P6 9000 9000 255 ")
    with pytest.raises(UserError, match=r"it claims 9000 x 9000 pixels in 17 bytes"):
        read_picture(tmp_path / "claim.ppm", 8)
    (tmp_path / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"code\.png cannot be read"):  # PostScript is a program: no interpreter is run
        read_picture(tmp_path / "code.png", 8)


# The same seed


def test_epochs_are_the_same_whoever_extracts_the_features(tmp_path, splits, monkeypatch):  # noqa: F811
    states = []
    for name, threads in (("alone", 1), ("together", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            patch.setattr(torch, "set_num_threads", lambda count: None)
            trainer = make_trainer(tmp_path / name, splits, epochs=2)
            trainer.fit()
            states.append(trainer.model.state_dict())
    assert equal_states(*states)


def test_metrics_hold_no_number_that_is_not_one(tmp_path, splits):  # noqa: F811
    trainer = make_trainer(tmp_path, splits, epochs=2)
    trainer.tracker.scalars({"loss/train": math.nan, "loss/validation": math.inf}, step=1, epoch=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss/train"] is None
