"""The script that made the bundled weights, end to end on a handful of images and a small random teacher."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distillation.train_vit_micro import main
from model.vit_micro import vit_micro


@pytest.mark.slow
def test_distillation_writes_matching_weights_and_scores(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("distillation.probe.L2_GRID", (0.1, 1.0))  # these converge soon
    options = ["--teacher_random", "--teacher_name", "test_vit", "--teacher_blocks", "3", "5", "--device", "cpu"]
    options += ["--limit", "48", "--views", "2", "--steps", "3", "--batch", "16", "--teacher_batch", "16"]
    options += ["--components", "8", "--anchors", "16", "--no_compile"]
    main(["--data", str(assets), "--out", str(tmp_path), *options])
    weights = load_file(tmp_path / "vit_micro.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    vit_micro().load_state_dict(weights)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    written = json.loads((tmp_path / "vit_micro.json").read_text())
    assert written["steps"] == 3
    assert 0 <= written["scores"]["distilled, last"]["logistic_accuracy"] <= 100
