"""benchmarks.devices: each section runs, in one process and in two."""

from argparse import Namespace

import pytest
import torch
from distributed_helpers import in_processes

from benchmarks import devices, devices_head, devices_worker

CPU = torch.device("cpu")


def of_devices(world) -> dict:
    options = Namespace(tiny=True, images=48, extracted=32, epochs=2, views=2)
    found = devices_worker.training(options, CPU, lambda batch: batch), devices_worker.extraction(options, CPU)
    return {"processes": world.size, **dict(zip(("training", "extraction"), found, strict=True))}


@pytest.mark.slow
def test_devices(capsys):
    row = in_processes(2, of_devices)[0]
    found = row["training"]
    assert found["images_per_second"] > 0 and row["extraction"]["images_per_second"] > 0
    assert found["all_to_all"] == 0 < min(found["sums"], found["waiting"])
    # Every token of an image, in three blocks of four experts each.
    assert found["gates"] == 65 * 3 * 4
    alone = {"processes": 1, "training": {**found, "images_per_second": found["images_per_second"] / 2}}
    alone["extraction"] = {"failed": "no room"}
    line = devices._line("training", row, alone)
    assert line[:2] == ["2", "default recipe"] and line[4] == "2.00x" and len(line) == 13
    line = devices._line("extraction", row, alone)
    assert line[:3] == ["2", "extraction", "16"] and line[4] == "" and len(line) == 13
    assert devices._line("extraction", alone, alone)[:3] == ["1", "extraction", "no room"]


def of_a_head(world) -> dict:
    options = Namespace(**devices.TINY)
    step = devices_head.measure(options, CPU, options.experts, options.rows)
    return {"step": step, "sizes": devices_head.sizes(options)}


@pytest.mark.slow
def test_devices_with_a_head():
    found = in_processes(2, of_a_head)[0]
    each = 32 * 16 + 16 + 2 * 16 + 16 * 100 + 100
    # Four of eight experts: weights, gradients and two moments, and the steps of the six parameters, which all share.
    assert found["step"]["expert_bytes"] == 4 * 4 * 4 * each + 6 * 4 and found["sizes"]["each"] == each
    assert found["sizes"]["common"] == 2 * 32 + 32 * 8 + 8
    assert min(found["step"][name] for name in ("all_to_all", "sums", "waiting")) > 0


def test_a_head_is_compared_with_that_of_one_process():
    alone = {"rows": 100, "seconds": 0.03, "expert_bytes": 4e9, "peak": 5e9, "largest_over_mean": 1.0}
    both = alone | {"rows": 200, "seconds": 0.04, "expert_bytes": 2e9, "all_to_all": 0.004, "sums": 0.001}
    row = {"processes": 2, "head_each": both | {"waiting": 0.002}}
    line = devices._line("head_each", row, {"processes": 1, "head": alone})
    assert line[:5] == ["2", "head", "200", "5,000", "1.50x"]
    assert line[5:] == ["40.00", "33.00", "4.00", "1.00", "2.00", "2.00 GB, 50 %", "5.0", "1.000"]
    line = devices._line("head_each", row, row)
    assert line[4] == "" and line[10] == "2.00 GB" and len(line) == 13
