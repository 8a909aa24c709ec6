"""Latency: measured on request, and on equivalent copies on a CPU."""

import torch
from block_helpers import images, moe_vit, spread, tiny_vit

from evaluation.latency import latencies, on_cpu, typical_seconds
from evaluation.report_tables import _cost_table
from evaluation.run_cost import NAMES
from model.backbone import Backbone


def test_on_a_cpu_it_is_measured_on_request():
    model = spread(moe_vit()).eval()
    found = latencies(model, model.backbone, images(3), seconds=0)
    assert set(found) <= set(NAMES) and list(found.values()) == [None] * 4
    found = latencies(model, model.backbone, images(3), wanted=True, seconds=0)
    assert found["latency_gpu_1"] is found["latency_gpu_256"] is None
    assert found["latency_cpu_1"] > 0 < found["latency_cpu_256"]


def test_time_of_other_work_is_not_counted(monkeypatch):
    """Calls of one second, to which other work adds eight in half of them; and one that is too slow to repeat."""
    clock = [0.0]
    monkeypatch.setattr("evaluation.latency.time.perf_counter", lambda: clock[0])
    warm_up = [2, *[1] * 13]
    durations = iter([*warm_up, 1, 1, 1, 9, 9, 9, 9, 1, 9, 9, 1, 1])

    def run():
        clock[0] += next(durations)

    assert typical_seconds(run, torch.device("cpu"), seconds=60) == 1
    slow = iter([6.0])
    assert typical_seconds(lambda: clock.__setitem__(0, clock[0] + next(slow)), torch.device("cpu")) == 6


@torch.no_grad()
def test_a_copy_for_the_cpu_computes_in_float32_and_does_not_change_the_model():
    model = spread(moe_vit()).eval()
    expected, _ = model(images())
    half = model.on(Backbone(tiny_vit(), ["mean:1", "mean:2"], torch.bfloat16))
    copy, backbone = on_cpu(half, half.backbone)
    assert copy.backbone is backbone and half.backbone.dtype == torch.bfloat16
    torch.testing.assert_close(copy(images())[0], expected)
    assert not torch.equal(half(images())[0], expected)


def test_the_report_compares_a_run_with_its_dense_twin():
    cost = dict.fromkeys(NAMES) | {"flops": 2e9, "latency_gpu_1": 0.002}
    beside = {"name": "twin", "cost": {"flops": 1e9, "memory_bytes": 2**20}}
    table = _cost_table({"cost": cost, "dense_twin": {"beside": beside}})
    assert table.header == ["what", "this run", "twin"]
    assert table.rows == [
        ["FLOPs per image", "2 G", "1 G"],
        ["weights in memory", "–", "1.0 MiB"],
        ["latency of 1 image, GPU", "2 ms", "–"],
    ]
    assert _cost_table({"cost": cost}).header == ["what", "value"]
