"""The training of heads in the study: in passes, by several processes, each stored when finished."""

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from study_helpers import telling_features

from benchmarks import study_runs, study_training
from benchmarks.study_heads import Features, Job, build, dense, grid, router_methods
from benchmarks.study_runs import Results, passes
from benchmarks.study_tables import rows, shown
from benchmarks.study_training import Average, Head, Pass, order, side_by_side, train_heads


@pytest.fixture(scope="module")
def features():
    return telling_features()


def test_heads_of_one_seed_see_the_same_batches():
    ten = Features(torch.zeros(2, 10, 1), torch.zeros(10).long(), torch.zeros(1, 1), torch.zeros(1).long(), 1, 1)
    runs = [[index_B.tolist() for index_B in order(seed, 3, ten, 4)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert [sorted({row // 10 for row in index_B}) for index_B in runs[0]] == [[0], [0], [1], [1], [0], [0]]
    assert len({*runs[0][0], *runs[0][1]}) == 8  # without one twice
    assert runs[0][0] != [row - 10 for row in runs[0][2]]


@pytest.mark.parametrize("head", [dense(8), {"logistic": True}, router_methods(8)["noisy_topk"]], ids=str)
def test_a_head_learns_and_is_reproducible(features, head):
    settings = grid(head)[0] if "logistic" in head else {"lr": 0.03, "warmup_steps": 3, "dropout": 0.2}
    job = Job("x", head, 0, "test", 25, settings)  # one step each
    ((found, first_M),) = train_heads([job], features)
    ((again, _),) = train_heads([job], features)
    assert found == again and found["macro_f1"] > 0.9
    assert first_M.shape == (60,) and first_M.min() >= 0
    assert ("specialisation" in found) == ("logistic" not in head and len(head["experts"]["sizes"]) > 1)


@pytest.mark.slow
def test_heads_of_a_pass_are_as_good_as_alone(features):
    # Without dropout and noise nothing is random in training: together or alone, the results are the same.
    head = {**router_methods(8)["mixtral"], "balance": {"switch": 0.0}}
    head["router"] = {**head["router"], "warmup_steps": 0}
    settings = {"lr": 0.03, "warmup_steps": 3, "dropout": 0.0}
    jobs = [Job("x", head, seed, "test", 25, {**settings, "lr": lr}) for seed, lr in ((0, 0.03), (1, 0.03), (1, 0.01))]
    together = train_heads(jobs, features)
    for job, (found, first_M) in zip(jobs, together, strict=True):
        ((alone, first_alone_M),) = train_heads([job], features)
        assert found == alone and (first_M == first_alone_M).all()
    assert len({found["loss"] for found, _ in together}) == 3


def test_the_average_is_that_of_timm():
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = build(router_methods(8)["noisy_topk"], Features(*[torch.zeros(1, 1, 32)] * 4, 2, 4), 0.0).train()
    ours, theirs = Average(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 60):  # past the warm-up of the decay
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.moe.usage_E += 1
        ours.before(step)
        ours.update()
        theirs.update(model, step=step)
    assert theirs.get_decay(59) == 0.9 > theirs.get_decay(9)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, msg=name)


def test_a_diverging_head_is_reported_and_does_not_end_the_others(features, monkeypatch):
    monkeypatch.setattr("config.optim.LARGEST", 1e38)
    bad = Job("x", dense(8), 0, "test", 3, {"lr": 1e30, "warmup_steps": 0, "clip_norm": 0.0, "dropout": 0.0})
    good = Job("x", dense(8), 0, "test", 3, {"lr": 1e-3, "dropout": 0.0})
    told, (found, _) = train_heads([bad, good], features)
    assert "not finite" in told and found["loss"] > 0


def test_methods_take_turns():
    jobs = [Job(name, {}, seed, "test", 1) for seed in range(5) for name in ("a", "alone")]
    cut = passes(jobs, 3, lambda job: job.method == "a")
    assert [[(job.method, job.seed) for job in part] for part in cut] == [
        [("a", 0), ("a", 1), ("a", 2)],
        [("alone", 0)],
        [("alone", 1)],
        [("alone", 2)],
        [("a", 3), ("a", 4)],
        [("alone", 3)],
        [("alone", 4)],
    ]


def test_a_failed_pass_is_repeated_head_by_head_and_only_lasting_failures_are_stored(tmp_path, features, monkeypatch):
    tried = []

    def train(jobs, features):
        tried.append(len(jobs))
        if len(jobs) > 1 or jobs[0].seed == 1:
            raise torch.OutOfMemoryError("too large")
        if jobs[0].seed == 2:
            raise KeyError("a slip of ours")
        return [({"macro_f1": 1.0}, np.zeros(3, dtype=np.int16))]

    monkeypatch.setattr(study_runs, "train_heads", train)
    monkeypatch.setitem(study_runs._features, "test", features)
    jobs = [Job("x", dense(8), seed, "test", 1) for seed in range(3)]
    results = Results(tmp_path)
    for job, outcome in zip(jobs, study_runs._train(jobs), strict=True):
        results.add(job, outcome)
    assert tried == [3, 1, 1, 1]
    assert [results.failed.get(job.key) for job in jobs] == [
        None,
        "too large",
        "RuntimeError: KeyError: 'a slip of ours'",
    ]
    assert [Results(tmp_path).knows(job) for job in jobs] == [True, True, False]


@pytest.mark.slow
def test_runs_in_progress_at_the_deadline_are_kept(tmp_path, features, monkeypatch):
    forked = multiprocessing.get_context("fork")  # a new interpreter imports for seconds
    monkeypatch.setattr(study_runs.multiprocessing, "get_context", lambda _: forked)
    jobs = [Job("x", dense(8), seed, "test", 2, {"lr": 1e-3, "dropout": 0.0}) for seed in range(400)]
    results = Results(tmp_path)
    with study_runs.Workers(1, 1, {"test": features}) as workers:
        workers.run(jobs, results, time.perf_counter() + 0.1)
    assert 1 <= len(results.scores) < 400


def test_tokens_and_rules_whose_shapes_vary_are_not_captured_together(features):
    on_gpu = type("Labels", (), {"is_cuda": True})()
    vectors, tokens = (
        replace(features, labels_N=on_gpu, held_MF=held) for held in (features.held_MF, torch.zeros(2, 3, 4))
    )
    methods = router_methods(16)
    alone = {name for name, head in methods.items() if not side_by_side(head, vectors)}
    assert alone == {"logistic regression", "switch, 4 experts", "gshard", "top_p"}
    assert not side_by_side(methods["noisy_topk"], tokens) and not side_by_side(methods["noisy_topk"], features)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its graphs cannot be tried")
def test_a_captured_pass_trains_like_eager_steps(features, monkeypatch):
    device = torch.device("cuda")
    tensors = {name: value.to(device) for name, value in vars(features).items() if isinstance(value, torch.Tensor)}
    there = replace(features, **tensors)
    settings = {"lr": 0.03, "warmup_steps": 3, "dropout": 0.0}
    for kind in ("mixtral", "noisy_topk"):
        head = router_methods(16)[kind]
        jobs = [Job("x", head, seed, "test", 60, settings) for seed in range(4)]
        assert Pass([Head(job, there, 60) for job in jobs], there, 200).captured
        together = [found for found, _ in train_heads(jobs, there)]
        assert min(found["macro_f1"] for found in together) > 0.9
        if kind == "mixtral":  # the noise of the other depends on who draws beside
            with monkeypatch.context() as patch:
                patch.setattr(study_training, "worth_capturing", lambda *_: False)
                alone = [train_heads([job], there)[0][0]["loss"] for job in jobs]
            assert alone == pytest.approx([found["loss"] for found in together], rel=0.02)


def test_finished_runs_are_recognised_and_shown_in_a_table(tmp_path, features):
    results = Results(tmp_path)
    jobs = [Job(name, dense(8), seed, "test", 5, grid({})[0]) for name in ("dense 8", "other") for seed in (0, 1)]
    for job in jobs:
        results.add(job, train_heads([job], features)[0])
    results.add(Job("other", dense(8), 2, "test", 5, {}), "the task loss is not finite")
    again = Results(tmp_path)
    assert again.scores == results.scores and list(again.failed.values()) == ["the task loss is not finite"]
    assert all(map(again.knows, jobs)) and not again.knows(Job("new", dense(8), 0, "test", 5, {}))
    runs = {name: {j.seed: again.scores[j.key] for j in jobs if j.method == name} for name in ("dense 8", "other")}
    table = {row["method"]: row for row in rows(runs, {}, {"other": "dense 8", "dense 8": None})}
    assert table["other"]["paired"] == pytest.approx((0.0, 0.0, 0.0)) and "paired" not in table["dense 8"]
    assert [len(line) for line in shown(list(table.values()))[1]] == [7, 7]


def test_logistic_regression_reads_the_original_images(features):
    noise_VNF = torch.rand(features.train_VNF.shape, generator=torch.Generator().manual_seed(0))
    there = replace(features, train_VNF=noise_VNF, plain_NF=features.train_VNF[0])
    ((found, _),) = train_heads([Job("x", {"logistic": "plain images"}, 0, "test", 1, {"weight_decay": 1e-3})], there)
    assert found["macro_f1"] > 0.9
