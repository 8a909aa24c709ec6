"""The study's arithmetic by hand, its methods' costs, and a head trained on features that give the class away."""

import math

import numpy as np
import pytest
import torch

from benchmarks.study import Results, best
from benchmarks.study_heads import Features, Job, build, dense, grid, router_methods, train_head, width_methods
from benchmarks.study_tables import agreement, cells, paired_interval, rows
from engine.summary import head_cost


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=generator)
    labels_N = torch.arange(200) % 4
    train_VNF = torch.stack([centres[labels_N] + 0.3 * torch.randn(200, 32, generator=generator) for _ in range(2)])
    held_M = torch.arange(60) % 4
    held_MF = centres[held_M] + 0.3 * torch.randn(60, 32, generator=generator)
    return Features(train_VNF, labels_N, held_MF, held_M, groups=2, classes=4)


def test_the_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.302653, so 2 -+ 4.302653 / sqrt(3) = 2 -+ 2.484138.
    mean, low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    assert math.isnan(paired_interval([1.0], [0.0])[1])


def test_agreement_ignores_the_experts_names():
    first = np.array([0, 0, 1, 1, 2, 2])
    assert agreement([first, (first + 1) % 3]) == pytest.approx(1.0)
    generator = np.random.default_rng(0)
    assert abs(agreement([generator.integers(4, size=2000) for _ in range(3)])) < 0.02
    assert agreement([first]) is None


def test_every_method_has_the_same_number_of_settings_and_can_be_built(features):
    methods = router_methods(16) | width_methods(64)
    assert {len(grid(head)) for head in methods.values()} == {4}
    for name, head in methods.items():
        if "logistic" not in head:
            assert build(head, features, 0.0)(features.held_MF)[0].shape == (60, 4), name


def test_mixtures_of_the_curve_cost_no_more_than_the_dense_head():
    wide = Features(
        torch.zeros(1, 2, 16 * 48), torch.zeros(2).long(), torch.zeros(2, 16 * 48), torch.zeros(2).long(), 16, 4
    )
    for width in (16, 128):
        costs = {n: head_cost(build(h, wide, 0.0), (16 * 48,)).flops for n, h in width_methods(width).items()}
        limit = costs[f"dense {width}"]
        assert all(value <= 1.005 * limit for value in costs.values()), costs


@pytest.mark.parametrize("head", [dense(8), {"logistic": True}, router_methods(8)["noisy_topk"]], ids=str)
def test_a_head_learns_and_is_the_same_again(features, head):
    optim = grid(head)[0] if "logistic" in head else {"lr": 0.03, "warmup_steps": 3}
    job = Job("x", head, 0, "test", 25, optim)  # one step each
    found, first_M = train_head(job, features)
    again, _ = train_head(job, features)
    assert found == again and found["macro_f1"] > 0.9
    assert first_M.shape == (60,) and first_M.min() >= 0
    assert ("specialisation" in found) == ("logistic" not in head and len(head["experts"]["sizes"]) > 1)


def test_finished_runs_are_known_again_and_make_a_table(tmp_path, features):
    results = Results(tmp_path)
    jobs = [Job(name, dense(8), seed, "test", 5, grid({})[0]) for name in ("dense 8", "other") for seed in (0, 1)]
    for job in jobs:
        results.add(job, *train_head(job, features))
    again = Results(tmp_path)
    assert again.scores == results.scores and best(again, jobs) == ["dense 8", "other"]
    runs = {name: {j.seed: again.scores[j.key] for j in jobs if j.method == name} for name in ("dense 8", "other")}
    table = {row["method"]: row for row in rows(runs, {}, "dense 8")}
    assert table["other"]["paired"] == pytest.approx((0.0, 0.0, 0.0)) and "paired" not in table["dense 8"]
    assert len(cells(table["other"])) == 10
