"""The protocol of the study: selection and test images are separate; the first expert of an image is correct."""

import argparse
import math

import numpy as np
import pytest
import torch
from feature_helpers import SPLITS, bank
from study_helpers import telling_features

from benchmarks import study
from benchmarks.study_heads import SETTINGS, Features, Job, build, dense, grid, mixture
from benchmarks.study_runs import Results
from benchmarks.study_tables import rows, shown
from benchmarks.study_training import Head, score, train_heads


@pytest.fixture(scope="module")
def features():
    return telling_features()


class Instant:
    """Replaces the workers: a head is scored at once, by its stage and its learning rate or decay."""

    def __init__(self, score_of):
        self.score_of, self.jobs = score_of, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, jobs, results, deadline):
        self.jobs += jobs
        for job in jobs:
            if not results.knows(job):
                found = {name: self.score_of(job) for name in ("accuracy", "macro_f1", "ece", "loss", "flops")}
                results.add(job, ({**found, "entropy": None, "experts": 1}, np.zeros(2, dtype=np.int16)))


def highest_rate_by_validation_lowest_by_test(job):
    rate = job.settings.get("lr", job.settings.get("weight_decay"))
    return {"selection": 1.0, "test": -1.0}[job.stage] * math.log10(rate) / 100 + 0.5


def test_validation_images_are_for_selection_and_test_images_for_the_scores(monkeypatch):
    backbone = argparse.Namespace(fingerprint=lambda: "w" * 64)
    monkeypatch.setattr(study, "load_splits", lambda config: SPLITS)
    monkeypatch.setattr(study, "load_backbone", lambda *_: backbone)
    monkeypatch.setattr(study, "build_bank", lambda *_: bank(mode="live"))
    options, rest = study.arguments(["--tiny"])
    config = study.configuration(study.PARTS["routers"], options, rest)
    found = study.load_features(config, 8, options, torch.device("cpu"))
    assert sorted(found) == ["selection", "test"]
    # The helper's features are its images' pixels: 0 to 39 for training, from 100 for validation, from 200 for test.
    assert found["selection"].held_MF.mean(dim=1).tolist() == list(range(100, 110))
    assert found["selection"].held_labels_M.tolist() == SPLITS.validation.labels_N.tolist()
    assert found["test"].held_MF.mean(dim=1).tolist() == list(range(200, 212))
    assert found["test"].held_labels_M.tolist() == SPLITS.test.labels_N.tolist()
    for stage in found.values():
        assert stage.train_VNF.shape[1] == 40 and stage.train_VNF.max() < 40
        assert stage.labels_N.tolist() == SPLITS.train.labels_N.tolist()
    assert torch.equal(found["selection"].train_VNF, found["test"].train_VNF)


def test_settings_are_chosen_by_their_validation_scores(tmp_path):
    methods = {"dense, a": dense(8), "logistic regression": {"logistic": True}}
    workers, results = Instant(highest_rate_by_validation_lowest_by_test), Results(tmp_path)
    for method, head in methods.items():  # the test scores are known, and must not be read
        for settings in grid(head):
            job = Job(method, head, study.SELECTION_SEED, "test", 2, settings)
            workers.run([job], results, math.inf)
    workers.jobs.clear()
    chosen = study.select(methods, argparse.Namespace(epochs=2), results, workers, math.inf)
    assert len(workers.jobs) == 20 and {job.stage for job in workers.jobs} == {"selection"}
    assert chosen["dense, a"]["settings"]["lr"] == 3.2e-2
    assert chosen["logistic regression"]["settings"]["weight_decay"] == 1e2
    assert chosen["logistic regression"]["validation"] == 0.52  # log10(100) / 100 + 0.5


def test_test_images_are_used_only_after_the_choice_and_only_with_it(tmp_path, monkeypatch, features):
    workers = Instant(highest_rate_by_validation_lowest_by_test)
    monkeypatch.setattr(study, "Workers", lambda *_: workers)
    monkeypatch.setattr(study, "report", lambda *_: None)
    words = ["--parts", "routers", "--width", "8", "--seeds", "2", "--more-seeds", "3", "--epochs", "2"]
    options, _ = study.arguments([*words, "--out", str(tmp_path)])
    study.run_part("routers", options, {}, {"selection": features, "test": features}, math.inf)
    stages = [job.stage for job in workers.jobs]
    selected = stages.index("test")
    assert set(stages[:selected]) == {"selection"} and set(stages[selected:]) == {"test"}
    tried = [job for job in workers.jobs if job.stage == "selection"]
    scored = [job for job in workers.jobs if job.stage == "test"]
    methods = study.PARTS["routers"].methods(options, features)
    assert len(tried) == 10 * len(methods) and {job.method for job in scored} == set(methods)
    assert {job.settings["lr"] for job in scored if "lr" in job.settings} == {3.2e-2}
    # A seed that has been selected on is not scored.
    assert {job.seed for job in tried} == {study.SELECTION_SEED} and {job.seed for job in scored} == {0, 1, 2}


def test_a_method_whose_settings_have_not_all_been_tried_is_left_out(tmp_path):
    methods = {"dense, a": dense(8), "dense, b": dense(9)}
    workers, results = Instant(highest_rate_by_validation_lowest_by_test), Results(tmp_path)
    all_but_one = type("AllButOne", (), {"run": lambda _, jobs, *rest: workers.run(jobs[:-1], *rest)})()
    assert list(study.select(methods, argparse.Namespace(epochs=2), results, all_but_one, math.inf)) == ["dense, a"]


def test_a_method_without_a_seed_is_paired_with_every_seed():
    names = ("accuracy", "macro_f1", "ece", "loss", "entropy", "flops")
    runs = {
        method: dict.fromkeys(range(3), dict.fromkeys(names, f1)) for method, f1 in (("dense", 0.5), ("logistic", 0.4))
    }
    first, second = rows(runs, {}, {"logistic": "dense", "dense": None}, seedless=["logistic"])
    assert (first["method"], first["seeds"], first["macro_f1_deviation"]) == ("dense", 3, 0.0)
    assert (second["seeds"], second["macro_f1_deviation"]) == (1, None)
    assert second["paired_with"] == {"method": "dense", "seeds": 3} and second["paired"][0] == pytest.approx(-0.1)


def test_the_null_of_specialisation_is_in_the_unit_of_specialisation():
    # Nulls of 0.2 and 0.4 nats, mean 0.3, where 1 would be log 8 = 2.079442: 0.144270.
    def run(normalised, null):
        scores = dict.fromkeys(("accuracy", "macro_f1", "ece", "loss", "entropy", "flops"), 0.5)
        return {**scores, "experts": 8, "specialisation": {"normalised": normalised, "null_mean": null}}

    (row,) = rows({"vmoe": {0: run(0.3, 0.2), 1: run(0.5, 0.4)}}, {}, {})
    assert (row["specialisation"], row["null"]) == pytest.approx((0.4, 0.144270), abs=1e-6)
    assert "0.400 (0.144)" in shown([row])[1][0]


def test_the_first_expert_of_an_image_is_that_of_its_largest_weight():
    # The gate's logits are the first four features, whose order a layer norm keeps. More images than one batch holds.
    torch.manual_seed(0)
    number = SETTINGS["batch"] + 300
    held_MF, labels_M = torch.randn(number, 8), torch.arange(number) % 2
    read = Features(held_MF[None], labels_M, held_MF, labels_M, groups=2, classes=2)
    for kind in ("mixtral", "vmoe"):
        model = build(mixture("", kind, [3] * 4, 2, norm="none"), read, 0.0)
        with torch.no_grad():
            model.moe.router.gate.weight.copy_(torch.eye(4, 8))
            model.moe.router.gate.bias.zero_()
        found, first_M = score(model, read)
        assert first_M.tolist() == held_MF[:, :4].argmax(dim=1).tolist(), kind
        assert found["experts"] == 4 and 0.98 < found["entropy"] <= 1


@pytest.mark.parametrize(
    ("head", "random"),
    [
        (mixture("", "mixtral", [4] * 3, 2), 2),  # an eighth of 16 steps
        (mixture("", "hash", [4] * 3, 2), 0),
        (dense(4), 0),
    ],
    ids=["mixtral", "hash", "dense"],
)
def test_an_eighth_of_the_steps_routes_at_random(features, monkeypatch, head, random):
    assert SETTINGS["warmup"] == 1 / 8
    told, train = [], Head.train

    def listen(self, x_BF, labels_B, warmup):
        told.append(warmup)
        train(self, x_BF, labels_B, warmup)

    monkeypatch.setattr(Head, "train", listen)
    train_heads([Job("x", head, 0, "test", 16, {"lr": 1e-3, "dropout": 0.0})], features)  # one step an epoch
    assert told == [True] * random + [False] * (16 - random)
