"""The study's arithmetic by hand, its methods' costs, and a head trained on features that give the class away."""

import math

import numpy as np
import pytest
import torch

from benchmarks.study import best
from benchmarks.study_curve import draw_curve
from benchmarks.study_heads import (
    Features,
    Job,
    build,
    dense,
    grid,
    router_methods,
    token_methods,
    train_head,
    width_methods,
)
from benchmarks.study_runs import Results
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
    methods = router_methods(16) | width_methods(64, features.groups)
    assert {len(grid(head)) for head in methods.values()} == {4}
    for name, head in methods.items():
        if "logistic" not in head:
            assert build(head, features, 0.0)(features.held_MF)[0].shape == (60, 4), name


@pytest.mark.parametrize("groups", [8, 16])
@pytest.mark.parametrize("width", [16, 128, 1024])
def test_mixtures_of_the_curve_cost_no_more_than_the_dense_head(groups, width):
    size, none_N = groups * 48, torch.zeros(2).long()
    wide = Features(torch.zeros(1, 2, size), none_N, torch.zeros(2, size), none_N, groups, 4)
    costs = {n: head_cost(build(h, wide, 0.0), (size,)).flops for n, h in width_methods(width, groups).items()}
    assert len(costs) == 4
    assert all(value <= 1.005 * costs[f"dense {width}"] for value in costs.values()), costs


def test_tokens_go_through_soft_moe():
    tokens = Features(
        torch.randn(1, 40, 5, 16), torch.arange(40) % 4, torch.randn(12, 5, 16), torch.arange(12) % 4, 1, 4
    )
    for name, head in token_methods(8).items():
        found, first_M = train_head(Job(name, head, 0, "test", 2, grid(head)[0]), tokens)
        assert 0 <= found["macro_f1"] <= 1 and first_M.shape == (12,), name


@pytest.mark.parametrize("head", [dense(8), {"logistic": True}, router_methods(8)["noisy_topk"]], ids=str)
def test_a_head_learns_and_is_the_same_again(features, head):
    settings = grid(head)[0] if "logistic" in head else {"lr": 0.03, "warmup_steps": 3, "dropout": 0.2}
    job = Job("x", head, 0, "test", 25, settings)  # one step each
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


def test_the_curve_is_drawn(tmp_path):
    def row(method, score):
        paired = {} if method.startswith("dense") else {"paired": (0.001, -0.002, 0.004)}
        return {"method": method, "seeds": 3, "macro_f1": score, "macro_f1_deviation": 0.002, **paired}

    found = [row(f"{family} {width}", 0.8) for family in ("dense", "shared", "alone") for width in (16, 32)]
    assert draw_curve(found[:-1], tmp_path / "curve.png").stat().st_size > 10_000
