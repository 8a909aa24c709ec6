"""The cost of a run, in numbers worked out by hand, and whether its scores are final."""

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.run_cost import NAMES, run_cost, shown
from evaluation.run_state import run_state
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig


class Linear(nn.Module):
    """A backbone of one linear layer."""

    image_size = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def runner(self, device):
        return self

    def forward(self, images_BCHW):
        return self.layer(images_BCHW.flatten(1))


def model():
    router = RouterConfig(kind="switch", top_k=1, norm="none")
    return VisionMoE((5,), 3, NeckConfig(norm="none"), router, ExpertsConfig(sizes=[[4], [8]])).eval()


def epochs(*scores):
    return [
        {
            "epoch": t,
            "step": t,
            "macro_f1/validation": f1,
            "speed/epoch_seconds": 2.0 * t,
            "speed/peak_memory_gib": t / 4,
        }
        | {"speed/images_per_second": 100.0 * t}
        for t, f1 in enumerate(scores, start=1)
    ]


def test_parameters_and_flops_by_hand_depend_on_the_load():
    shape = (5,)
    experts = [sum(p.numel() for p in expert.parameters()) for expert in model().moe.experts]
    cost = run_cost(model(), Linear(), shape, np.array([0.25, 0.75]), [], None)
    gate = 5 * 2 + 2
    assert cost["trained_parameters"] == sum(experts) + gate
    assert cost["total_parameters"] == cost["trained_parameters"] + 12 * 5 + 5
    assert cost["active_parameters"] == round(gate + 0.25 * experts[0] + 0.75 * experts[1])
    products = [2 * (5 * units + units * 3) for units in (4, 8)]
    head = 2 * 5 * 2 + 0.25 * products[0] + 0.75 * products[1]
    counters = 2 * 2 * 8  # of learned routing and of warm-up, int64
    assert cost["memory_bytes"] == 4 * cost["total_parameters"] + counters
    assert cost["head_flops"] == head and cost["flops"] == 2 * 12 * 5 + head
    assert cost["training_seconds"] is cost["images_per_second"] is cost["kept_epoch"] is cost["epochs"] is None


def test_times_and_memory_are_those_of_the_history():
    cost = run_cost(model(), None, (5,), np.array([0.5, 0.5]), epochs(0.1, 0.2, 0.3), 2)
    assert (cost["training_seconds"], cost["images_per_second"], cost["peak_memory_gib"]) == (12.0, 200.0, 0.75)
    assert (cost["kept_epoch"], cost["epochs"], cost["total_parameters"], cost["flops"]) == (2, 3, None, None)
    assert cost.keys() >= NAMES.keys()
    older = [{"epoch": 1, "step": 1}, *epochs(0.1)]  # of a version that did not log all of it
    assert run_cost(model(), None, (5,), np.array([0.5, 0.5]), older, 1)["training_seconds"] is None


def test_figures_are_shown_with_their_units():
    values = {"flops": 35_200_000_000, "training_seconds": 67.2, "peak_memory_gib": 1.26, "images_per_second": 4321.7}
    assert [shown(*item) for item in values.items()] == ["35.2 G", "1 min 7 s", "1.3 GiB", "4,322"]
    values = {"memory_bytes": 3 * 2**19, "latency_gpu_1": 0.01234, "latency_cpu_256": 2.5}
    assert [shown(*item) for item in values.items()] == ["1.5 MiB", "12.3 ms", "2.5 s"]
    assert [shown("flops", None), shown("kept_epoch", 12)] == ["–", "12"]


@pytest.mark.parametrize(
    ("scores", "config", "scored", "state"),
    [
        ((0.1, 0.2), {"train.epochs": 2}, 2, ""),
        ((0.1, 0.2), {"train.epochs": 5}, 2, "unfinished: 2 of 5 epochs"),
        ((0.1, 0.2, 0.3), {"train.epochs": 3}, 2, "stale: scored after epoch 2, now at 3"),
        ((0.1, 0.2, 0.3), {"train.epochs": 9}, 2, "unfinished: 3 of 9 epochs; stale: scored after epoch 2, now at 3"),
        ((0.1, 0.3, 0.2, 0.3), {"train.epochs": 9, "train.patience": 2}, 4, ""),
        ((0.1, 0.3, 0.2, 0.3), {"train.epochs": 9, "train.patience": 3}, 4, "unfinished: 4 of 9 epochs"),
        ((0.1,), {}, None, ""),
        ((), {"train.epochs": 9}, None, ""),
    ],
)
def test_reasons_not_to_trust_scores_are_reported(scores, config, scored, state):
    assert run_state(epochs(*scores), config, scored) == state


def test_stale_results_have_a_reason():
    reason = "Results from before the run was resumed after epoch 2 of 9"
    said = "stale: results from before the run was resumed after epoch 2 of 9"
    assert run_state([], {}, None, reason) == said
    assert run_state(epochs(0.1, 0.2, 0.3), {"train.epochs": 3}, 2, reason) == said


def test_peak_memory_grows_with_what_is_allocated():
    from common.memory import peak_memory

    before = peak_memory(torch.device("cpu"))
    held = torch.ones(1 << 26)  # 256 MiB
    assert peak_memory(torch.device("cpu")) >= max(before, held.nbytes)
