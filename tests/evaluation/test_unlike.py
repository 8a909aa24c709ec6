"""Images unlike the training images: distances by hand, the rejected share, and digits against photos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from assembly.loading import load_trained
from assembly.unlike import FILE, frozen_features, load_unlike
from common.errors import UserError, say
from data.datasets import load_splits
from data.datasets.cifar100 import load_cifar100
from evaluation.unlike import Unlike


def test_the_distance_is_mahalanobis_to_the_nearest_class(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[2.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.3]])
    centres = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 1.0]])
    labels = torch.arange(2).repeat(2000)
    x = centres[labels] + torch.randn(4000, 3, generator=generator) @ mix
    found = Unlike.of(x, labels, 2, x)
    means = torch.stack([x[labels == label].mean(0) for label in range(2)])
    inverse = torch.linalg.inv(torch.from_numpy(np.cov((x - means[labels]).numpy().T, bias=True)).float())
    away = x[:20] + 3
    direct = torch.stack([((away - mean) @ inverse * (away - mean)).sum(1).sqrt() for mean in means]).amin(0)
    assert torch.allclose(found.distances(away), direct, rtol=0.02)  # except for the shrinkage
    assert (found.distances(x) > found.threshold(0.05)).float().mean() == pytest.approx(0.05, abs=0.002)
    found.save(tmp_path / FILE)
    assert torch.equal(Unlike.load(tmp_path / FILE).quantiles_Q, found.quantiles_Q)
    (tmp_path / FILE).write_bytes(b"none")
    with pytest.raises(UserError, match="is corrupt: delete it"):
        Unlike.load(tmp_path / FILE)


def test_a_constant_feature_is_ignored():
    x = torch.randn(50, 3)
    x[:, 1] = 7
    assert torch.isfinite(Unlike.of(x, torch.zeros(50, dtype=torch.int64), 2, x).distances(x)).all()


@pytest.mark.slow
def test_photos_are_distinguished_from_digits(tiny_run, assets, tmp_path, monkeypatch, capsys):
    from sklearn.metrics import roc_auc_score

    trained = load_trained(tiny_run, "cpu")
    unlike = load_unlike(trained, None, say)
    test = load_splits(trained.config.data).test
    photos = load_cifar100(assets, download=False)[1].images_NCHW[:400].float().mean(1, keepdim=True)
    photos = torch.nn.functional.interpolate(photos, (8, 8), mode="area").round().to(torch.uint8).repeat(1, 3, 1, 1)
    own, other = (unlike.distances(frozen_features(trained, part)) for part in (test.images_NCHW, photos))
    score = roc_auc_score([0] * len(own) + [1] * len(other), torch.cat([own, other]))
    assert score > 0.9
    Image.fromarray(photos[int(other.argmax())].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    words = [tiny_run, tmp_path / "photo.png", "--reject", "0.05", "--json"]
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, words)])
    predict.main()
    (row,) = json.loads(capsys.readouterr().out)["images"]
    assert row["rejected"] and row["distance"] > row["threshold"]


@pytest.mark.parametrize("share", ["0", "1", "5", "-0.1"])
def test_a_share_is_between_zero_and_one(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        predict.parse(["RUN", "cat.png", f"--reject={share}"])
