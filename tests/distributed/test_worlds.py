"""The processes of a run: ranks, rejected set-ups, and joining of predictions for parts of a split."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from assembly.pipeline import pick_device
from common import distributed
from common.distributed import World, expected_world, meeting_at, require_alone
from common.errors import UserError, exit_code_of
from evaluation.block_routing import BlockRouting
from evaluation.predictions import Predictions, Removals
from evaluation.together import join, own_part


def test_work_is_distributed_evenly_and_in_order():
    assert World(0, 3).sizes(8) == (3, 3, 2) and World(0, 3).sizes(2) == (1, 1, 0)
    parts = [World(rank, 3).part(8) for rank in range(3)]
    assert [list(range(8))[part] for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_process_started_alone_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert expected_world() == World(0, 1, 0)
    assert World().gather("x") == ["x"] and World().broadcast("x") == "x" and not World().all(False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="not to numbers: start several processes with torchrun"):
        expected_world()


def test_each_process_gets_a_separate_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda:1") and pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="PyTorch finds 2 GPUs for process 3 of this machine: start at most 2"):
        pick_device("auto")


def test_a_gpu_shared_by_two_processes_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "_name_of", lambda device: "GPU-1")
    gpus = [("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-1")]
    with pytest.raises(UserError, match="ranks 0 and 2 share a GPU of a, and each needs its own: start at most 1"):
        distributed._require_separate_gpus(SimpleNamespace(gather=lambda own: gpus), torch.device("cuda:0"))
    distributed._require_separate_gpus(SimpleNamespace(gather=lambda own: [("",), ("",)]), torch.device("cpu"))


def test_a_split_with_fewer_images_than_processes_is_predicted_by_each(monkeypatch):
    monkeypatch.setattr("evaluation.together.world", lambda: World(1, 3))
    assert own_part(2).tolist() == [0, 1] and own_part(7).tolist() == [3, 4]


def predictions(images: int, kept: int) -> Predictions:
    """Predictions with two experts in one block; kept: images with known single tokens."""
    flat = np.arange(images)
    blocks = BlockRouting(
        ("block_0",),
        np.ones((images, 1, 2), dtype=np.int32),
        np.ones((images, 1, 2), dtype=np.float32),
        np.ones((images, 1), dtype=np.float32),
        np.zeros((kept, 1, 4), dtype=np.uint8),
    )
    removals = Removals(np.zeros((2, images), dtype=np.int64), np.full((2, 2), images), np.full((2, 2), images))
    logits_NC, gate_NE = np.zeros((images, 3), dtype=np.float32), np.zeros((images, 2), dtype=np.float32)
    weight_A = np.ones(images, dtype=np.float32)
    return Predictions(logits_NC, flat % 3, flat, flat % 2, weight_A, gate_NE, removals, blocks)


def test_predictions_for_parts_are_joined_in_order():
    whole = join([predictions(3, 3), predictions(4, 2), predictions(2, 2)])
    assert whole.sample_A.tolist() == list(range(9)) and whole.labels_N.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1]
    assert whole.removals.predicted_EN.shape == (2, 9) and (whole.removals.before_EE == 9).all()
    assert whole.blocks.count_NLE.shape == (9, 1, 2)
    assert len(whole.blocks.first_MLT) == 5  # the first images without a gap: those of the third part follow one


def _asks(rank, meeting):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with (meeting.parent / f"{rank}.txt").open("w") as file:
        sys.stderr = file
        with meeting_at(meeting):
            sys.exit(exit_code_of(lambda: require_alone("evaluate.py")))


def test_a_single_process_program_rejects_torchrun_once(tmp_path):
    require_alone("evaluate.py")
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_asks, args=(rank, tmp_path / "store")) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [2, 2]
    said = "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert said.count("\n") == 1 and "evaluate.py runs as one process: start it with python evaluate.py" in said


@pytest.mark.parametrize("name", ["evaluate", "predict", "compress", "export", "tune"])
def test_each_other_program_rejects_torchrun(name):
    assert f'require_alone("{name}.py")' in (ROOT / f"{name}.py").read_text(encoding="utf-8")
