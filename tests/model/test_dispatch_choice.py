"""The choice of the dispatch mode: by size, device and graph, or forced."""

import pytest
import torch
from test_dispatch import EQUAL, UNEQUAL, routing_of

from model import dispatch as module
from model.classifier import NeckConfig, VisionMoE
from model.dispatch import DISPATCHERS, choose, dispatch
from model.experts import ExpertsConfig, build_experts
from model.routers import RouterConfig


class OnGpu:
    """The properties of a tensor that `choose` reads."""

    is_cuda, dtype, device, shape = True, torch.bfloat16, None, (1000, 8)


@pytest.mark.parametrize(
    ("sizes", "top_k", "work", "static", "kernel_there", "expected"),
    [
        (EQUAL, 1, 1e18, False, True, "dense"),  # little work
        (UNEQUAL, 2, 1e18, True, True, "dense"),
        (EQUAL, len(EQUAL), 0, False, True, "dense"),  # all of them are chosen
        (EQUAL, 1, 0, False, True, "grouped"),
        (EQUAL, 1, 0, False, False, "sorted"),
        (EQUAL, 1, 0, True, False, "dense"),
        ([[9]] * 4, 1, 0, False, True, "sorted"),  # no size for the kernel
        (UNEQUAL, 1, 0, False, True, "sorted"),
        (UNEQUAL, 1, 0, True, True, "dense"),  # no two of one shape
        ([[8], [16]] * 8, 1, 0, False, True, "grouped"),
        ([[8], [16]] * 8, 1, 0, True, True, "grouped"),
        ([[8], [16]] * 8, 1, 0, True, False, "dense"),
        ([[8], [16]] * 2, 1, 0, True, True, "grouped"),
        ([[8], [16]] * 2, 2, 0, True, True, "dense"),  # a sample goes to half of them
        (EQUAL, 2, 0, True, True, "grouped"),
        ([[8], [16]], 1, 0, False, True, "sorted"),
    ],
)
def test_the_mode_depends_on_size_and_device(monkeypatch, sizes, top_k, work, static, kernel_there, expected):
    experts = build_experts(ExpertsConfig(sizes=sizes), 8, 5)[0]
    if top_k < len(sizes):
        on_cpu = choose(2 * top_k, experts, torch.randn(2, 8), static)
        assert on_cpu == (
            "dense" if static else "sorted"
        )  # waiting costs nothing on a CPU, but is not possible in a graph
    monkeypatch.setattr(module, "has_kernel", lambda x_BD: kernel_there)
    monkeypatch.setattr(module, "DENSE_WORK", work)
    monkeypatch.setattr(module, "DENSE_WORK_IN_A_GRAPH", (work, work))
    assert choose(1000 * top_k, experts, OnGpu(), static) == expected


def test_in_a_graph_equal_experts_are_grouped_at_less_work(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda x_BD: True)
    monkeypatch.setattr(module, "DENSE_WORK_IN_A_GRAPH", (0, 1e18))
    found = []
    for sizes in ([[8]] * 16, [[8], [16]] * 8):
        experts = build_experts(ExpertsConfig(sizes=sizes), 8, 5)[0]
        found += [choose(1000, experts, OnGpu(), static) for static in (False, True)]
    assert found == ["dense", "grouped", "dense", "dense"]


@pytest.mark.parametrize(("sizes", "many"), [([[8], [16]] * 8, 66_000), ([[8]] * 16, 263_000)])
def test_experts_with_many_samples_run_one_after_another(monkeypatch, sizes, many):
    experts = build_experts(ExpertsConfig(sizes=sizes), 8, 5)[0]
    monkeypatch.setattr(module, "has_kernel", lambda x_BD: True)
    monkeypatch.setattr(module, "DENSE_WORK", 0)
    monkeypatch.setattr(module, "DENSE_WORK_IN_A_GRAPH", (0, 0))
    found = []
    for samples in (many - 2000, many):
        monkeypatch.setattr(OnGpu, "shape", (samples, 8))
        found.append(choose(samples, experts, OnGpu()))
    assert found == ["grouped", "sorted"]
    assert choose(many, experts, OnGpu(), static=True) == "grouped"
    experts = build_experts(ExpertsConfig(sizes=sizes, inputs=[[0]] * len(sizes)), 16, 5, 2)[0]
    assert choose(many, experts, OnGpu(), static=True) == "dense"  # they have no rows in common


def test_a_mode_can_be_forced(monkeypatch):
    used = []
    for how in DISPATCHERS:
        monkeypatch.setitem(
            DISPATCHERS, how, lambda *args, how=how, way=DISPATCHERS[how]: used.append(how) or way(*args)
        )
    for how in ("dense", "grouped", "sorted", "auto"):
        experts = ExpertsConfig(sizes=UNEQUAL, dispatch=how)
        VisionMoE((8,), 5, NeckConfig(), RouterConfig(), experts)(torch.randn(4, 8))
    dispatch(torch.randn(4, 8), routing_of(4, 4, 2), build_experts(ExpertsConfig(sizes=UNEQUAL), 8, 5)[0], "static")
    assert used == ["dense", "grouped", "sorted", "sorted", "dense"]
