"""The bundled ViT: intact, frozen, and far better than its random initialisation."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from assembly.pipeline import Extractor
from data.datasets import DataConfig, load_splits
from model.backbone import BackboneConfig, load_backbone
from model.errors import InputError
from model.vit_micro import WEIGHTS, WEIGHTS_SHA256, load_vit_micro, vit_micro

CPU = torch.device("cpu")


def test_the_file_is_small_and_loads():
    model = load_vit_micro()
    assert WEIGHTS.stat().st_size <= 8_000_000
    assert 3_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    tokens = model.forward_features(torch.zeros(2, 3, 32, 32))
    assert tokens.shape == (2, 65, 192)
    assert torch.isfinite(tokens).all()


def test_it_is_frozen_and_normalises_as_in_training():
    backbone = load_backbone(BackboneConfig("bundled/vit_micro"), CPU).train()
    assert not backbone.vit.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.image_size == 32
    assert backbone.mean == (0.5071, 0.4865, 0.4409)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_corrupt_file_is_rejected_by_name_and_hash(tmp_path, damage):
    path = tmp_path / "vit_micro.safetensors"
    content = bytearray(WEIGHTS.read_bytes())
    if damage == "altered":
        content[-1] ^= 1
    if damage != "missing":
        path.write_bytes(content[:-100] if damage == "truncated" else content)
    with pytest.raises(InputError) as caught:
        load_vit_micro(path)
    message = str(caught.value)
    assert str(path) in message and "git checkout" in message and "\n" not in message
    assert damage == "missing" or WEIGHTS_SHA256 in message


def test_it_accepts_neither_other_weights_nor_another_size(tmp_path):
    for options in ({"weights": tmp_path / "x.pth"}, {"image_size": 64}):
        with pytest.raises(InputError, match="a fixed size and its own weights"):
            load_backbone(BackboneConfig("bundled/vit_micro", **options), CPU)


@pytest.mark.slow
def test_it_beats_its_random_initialisation_on_digits_by_a_wide_margin():
    splits = load_splits(DataConfig(name="digits", max_per_class=24))
    scores = {}
    for pretrained in (True, False):
        extract = Extractor(load_backbone(BackboneConfig("bundled/vit_micro", pretrained=pretrained), CPU), 256)
        features = {name: extract(splits[name].images_NCHW).numpy() for name in ("train", "test")}
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        probe.fit(features["train"], splits.train.labels_N)
        scores[pretrained] = probe.score(features["test"], splits.test.labels_N)
    assert scores[True] > 0.85
    assert scores[True] > scores[False] + 0.1
    assert 1 - scores[True] < (1 - scores[False]) / 2


@pytest.mark.slow
def test_its_features_separate_real_classes(assets):
    splits = load_splits(DataConfig(root=assets, max_classes=10, max_per_class=32))
    extract = Extractor(load_backbone(BackboneConfig("bundled/vit_micro"), CPU), 256)
    train, test = splits.train, splits.test.subset(torch.arange(0, len(splits.test), 5))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(extract(train.images_NCHW).numpy(), train.labels_N)
    assert probe.score(extract(test.images_NCHW).numpy(), test.labels_N) > 0.75


def test_the_random_variant_is_the_same_architecture():
    assert vit_micro().state_dict().keys() == load_vit_micro().state_dict().keys()
