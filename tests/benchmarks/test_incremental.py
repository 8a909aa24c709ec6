"""Classes in steps: the protocol by hand, ridge regression in steps against ridge regression at once, the program."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from benchmarks import incremental
from benchmarks.common import Limit
from benchmarks.incremental_ridge import PENALTIES, normalised, ridge, solve
from benchmarks.incremental_scores import Stream, scored


def stream(memory: int = 0) -> Stream:
    labels = torch.arange(6).repeat(8)
    parts = {name: SimpleNamespace(labels_N=labels, num_classes=6) for name in ("train", "validation", "test")}

    class Splits(SimpleNamespace):
        def __getitem__(self, name):
            return parts[name]

    return Stream.of(Splits(train=parts["train"]), 3, memory)


def test_each_class_comes_once_and_old_images_are_few():
    found = stream(memory=2)
    assert sorted(found.seen(2)) == list(range(6)) and [len(classes) for classes in found.classes] == [2, 2, 2]
    labels = found.labels["train"]
    assert all(set(labels[rows].tolist()) == set(of) for rows, of in zip(found.rows, found.classes, strict=True))
    assert [len(rows) for rows in found.kept] == [0, 4, 8]
    assert set(labels[found.kept[2]].tolist()) == set(found.seen(1))
    assert stream().classes == found.classes and not len(stream().kept[2])


def test_mean_and_forgetting_by_hand():
    found = scored(stream(), [[0.9], [0.8, 0.7], [0.6, 0.75, 0.45]], 1.0)
    assert found["after"] == pytest.approx([0.9, 0.75, 0.6]) and found["mean"] == pytest.approx(0.75)
    assert found["last"] == pytest.approx(0.6)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)


def test_ridge_regression_in_steps_equals_ridge_regression_at_once():
    torch.manual_seed(0)
    found, features = stream(), torch.randn(48, 10) + F.one_hot(torch.arange(6).repeat(8), 10) * 3
    labels = torch.arange(6).repeat(8)
    held = (features + 0.5 * torch.randn(48, 10), labels)
    data = SimpleNamespace(train_VNF=features[None], labels_N=labels, validation=held, test=held, groups=2)
    result = ridge(found, data, 0, 0, Limit(60))
    x = normalised(features, 2).double()
    penalty = result["penalties"][-1]
    assert penalty in PENALTIES
    weight = solve(x.T @ x, x.T @ F.one_hot(labels, 6).double(), penalty)
    assert solve(-x.T @ x, weight, 0.1).isnan().all()  # no positive matrix: no answer, and no error
    direct = torch.linalg.solve(
        x.T @ x + penalty * torch.eye(10, dtype=torch.float64), x.T @ F.one_hot(labels, 6).double()
    )
    assert torch.allclose(weight, direct)
    answers = (normalised(held[0], 2).double() @ weight).argmax(dim=1)
    assert result["last"] == pytest.approx(float((answers == labels).double().mean()))


@pytest.mark.slow
def test_the_program_continues_where_it_stopped(tmp_path, capsys, monkeypatch):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--steps", "2", "--methods"]
    incremental.main([*words, "ncm", "mixture_drawn"])
    lines = (tmp_path / "incremental_tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["ncm", "mixture_drawn"]
    (tmp_path / "incremental_tiny.jsonl").write_text("\n".join([*lines, '{"method": "cut o']))
    # Methods that fail or lack time are reported, and the others continue.
    monkeypatch.setattr(incremental, "Heads", Mock(side_effect=torch.OutOfMemoryError("too large")))
    incremental.main([*words, "ncm", "dense", "first_both", "blocks"])
    lines = (tmp_path / "incremental_tiny.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    assert [row["method"] for row in rows][2:] == ["first_both", "blocks"]
    said = capsys.readouterr()
    assert "| blocks " in said.out and "| first_both " in said.out
    assert "dense, seed 0: no result, out of memory" in said.err
    incremental.main([*words, "ridge", "--seconds", "0"])
    assert "ridge, seed 0: no result, TimeoutError: the 0 s of --seconds are over" in capsys.readouterr().err
