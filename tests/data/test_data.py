"""Image sets, splits, augmentation per image, the feature bank."""

import re

import numpy as np
import pytest
import torch

from common.errors import UserError
from config.features import FeaturesConfig
from data.augment import AugmentConfig, View, apply_view, draw_view
from data.datasets import DataConfig, load_splits, stratified_split
from data.image_set import ImageSet
from features.bank import FeatureBank
from model.preparation import prepare

CPU = torch.device("cpu")


def image_set(labels, size=4):
    labels_N = torch.tensor(labels)
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, size, size)
    return ImageSet(images, labels_N, tuple(f"class {c}" for c in range(int(labels_N.max()) + 1)))


def test_digits_come_in_three_stratified_disjoint_splits():
    splits = load_splits(DataConfig(name="digits"))
    sizes = [len(splits[name]) for name in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    assert sizes == [1293, 144, 360]
    assert splits.train.images_NCHW.dtype == torch.uint8
    assert splits.train.images_NCHW.shape[1:] == (3, 8, 8)
    assert splits.train.images_NCHW.max() == 255
    for name in ("validation", "test"):
        share_C = torch.bincount(splits[name].labels_N) / len(splits[name])
        assert share_C.tolist() == pytest.approx([0.1] * 10, abs=0.02)
    again = load_splits(DataConfig(name="digits"))
    other = load_splits(DataConfig(name="digits", split_seed=1))
    assert torch.equal(splits.validation.images_NCHW, again.validation.images_NCHW)
    assert not torch.equal(splits.validation.labels_N, other.validation.labels_N)


def test_a_split_partitions_the_images():
    images = image_set([0, 1] * 20)
    rest, held_out = stratified_split(images, 0.25, 0, "data.validation")
    both = torch.cat([rest.images_NCHW, held_out.images_NCHW]).flatten(1)
    assert len(held_out) == 10
    assert torch.bincount(held_out.labels_N).tolist() == [5, 5]
    assert len(torch.unique(both, dim=0)) == 40


@pytest.mark.parametrize(
    ("labels", "fraction", "words"),
    [([0, 0, 1], 0.5, "class 'class 1' has 1 image"), ([0, 0, 1, 1, 2, 2], 0.9, "leaves too few for all 3 classes")],
)
def test_impossible_splits_are_reported(labels, fraction, words):
    with pytest.raises(UserError, match=words):
        stratified_split(image_set(labels), fraction, 0, "data.validation")


def test_a_small_fraction_holds_out_one_image_of_each_class(capsys):
    rest, held_out = stratified_split(image_set([0, 1, 2, 3] * 4), 0.1, 0, "data.validation")
    assert torch.bincount(held_out.labels_N).tolist() == [1, 1, 1, 1] and len(rest) == 12
    line = "data.validation 0.1 of 16 images is less than one for each of the 4 classes: 4 images are held out"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "count"), [(2, 2), (2, 3), (10, 2), (300, 2), (300, 3), (7, 20)])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.33, 0.66, 0.9, 0.999])
def test_the_suggested_fraction_for_few_images_works(classes, count, fraction):
    images = image_set(list(range(classes)) * count, size=1)
    try:
        stratified_split(images, fraction, 0, "data.test")
    except UserError as error:
        advised = float(re.search(r"use a smaller fraction, at most ([\d.]+)", str(error))[1])
        assert all(len(part) >= classes for part in stratified_split(images, advised, 0, "data.test"))


def test_a_class_needs_an_image_for_each_split_drawn_from_the_training_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(16)[:, None, None] * np.ones((16, 8, 8)), labels=np.arange(16) // 2)
    with pytest.raises(UserError, match=r"class '0' has 2 images for three splits \(data\.validation"):
        load_splits(DataConfig(name="arrays", root=tmp_path / "a.npz", image_size=8))


def test_limits_keep_the_first_classes_and_images():
    splits = load_splits(DataConfig(name="digits", max_classes=3, max_per_class=20))
    assert splits.train.class_names == ("0", "1", "2")
    total = sum(len(splits[name]) for name in ("train", "validation", "test"))
    assert total == 60


def test_each_image_is_augmented_independently():
    images = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4).repeat(3, 3, 1, 1)
    view = View(torch.tensor([False, True, False]), torch.tensor([[0, 0], [0, 0], [1, -1]]))
    out = apply_view(images, view)[:, 0]
    plain = torch.arange(16).reshape(4, 4)
    assert torch.equal(out[0].long(), plain)
    assert torch.equal(out[1].long(), plain.flip(1))
    # One down, one left: rows 1 2 3 then 2 (reflected), columns 1 (reflected) then 0 1 2.
    assert out[2].tolist() == [[5, 4, 5, 6], [9, 8, 9, 10], [13, 12, 13, 14], [9, 8, 9, 10]]


def test_views_are_seeded_differ_and_mix():
    config = AugmentConfig(flip=True, crop=3, seed=5)
    view, again, other = draw_view(1000, config, 0), draw_view(1000, config, 0), draw_view(1000, config, 1)
    assert torch.equal(view.shift_N2, again.shift_N2)
    assert torch.equal(view.flip_N, again.flip_N)
    assert not torch.equal(view.shift_N2, other.shift_N2)
    assert 0.4 < view.flip_N.float().mean() < 0.6
    assert sorted(view.shift_N2.unique().tolist()) == [-3, -2, -1, 0, 1, 2, 3]
    off = draw_view(100, AugmentConfig(flip=False, crop=0), 0)
    assert not off.flip_N.any() and not off.shift_N2.any()


def test_prepare_resizes_clamps_and_normalises():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 4:] = 255  # an edge, where bicubic overshoots
    out = prepare(images, 32, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert out.shape == (2, 3, 32, 32)
    assert out[:, 0].min().item() == pytest.approx(-2.0)
    assert out[:, 0].max().item() == pytest.approx(2.0)
    assert out[:, 1].max().item() == pytest.approx(1.0)


def strong_view(box, color, strong=(True,)):
    count = len(strong)
    still = torch.zeros(count, dtype=torch.bool), torch.zeros(count, 2, dtype=torch.int64)
    return View(*still, torch.tensor([box] * count), torch.tensor([color] * count), torch.tensor(strong))


def test_enlarging_shows_the_box_and_does_not_change_other_images():
    # Left half 40, right half 200: the box of the right half's middle is 200 everywhere.
    images = torch.full((2, 3, 16, 16), 40, dtype=torch.uint8)
    images[..., 8:] = 200
    out = apply_view(images, strong_view([0.5, 0.0, 0.25, 0.25], [1.0, 1.0, 1.0], strong=(True, False)))
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert (out[0] == 200).all() and torch.equal(out[1], images[1])
    whole = apply_view(images, strong_view([0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0], strong=(True, True)))
    assert (whole.int() - images.int()).abs().max() <= 1  # bicubic at the pixel centres, rounded


def test_brightness_contrast_and_saturation_by_hand():
    # One pixel of (51, 102, 153) = (.2, .4, .6). Brightness 1.5: (.3, .6, .9), mean .6. Contrast .5: (.45, .6, .75).
    # Grey is .6; saturation 2: (.3, .6, .9) = (76.5, 153, 229.5).
    pixel = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1)
    out = apply_view(pixel, strong_view([0.0, 0.0, 1.0, 1.0], [1.5, 0.5, 2.0]))
    assert (out.flatten().float() - torch.tensor([76.5, 153.0, 229.5])).abs().max() <= 0.6


def test_strong_views_are_drawn_within_their_limits():
    config = AugmentConfig(scale=0.5, color_jitter=0.2, strong=0.5)
    view, again = draw_view(4000, config, 3), draw_view(4000, config, 3)
    assert torch.equal(view.box_N4, again.box_N4) and torch.equal(view.strong_N, again.strong_N)
    centre, sides = view.box_N4[:, :2], view.box_N4[:, 2:]
    assert (centre.abs() + sides <= 1 + 1e-6).all()  # the box lies within the image
    area, ratio = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert area.min() >= 0.5 / 1.2 - 1e-4 and area.max() <= 1 and ratio.min() > 1 / 1.21 and ratio.max() < 1.21
    assert (view.color_N3 - 1).abs().max() <= 0.2 and abs(view.strong_N.float().mean() - 0.5) < 0.05
    plain = draw_view(4000, AugmentConfig(), 3)  # other draws do not change the flips and crops of a seed
    assert (
        plain.box_N4 is None and torch.equal(plain.flip_N, view.flip_N) and torch.equal(plain.shift_N2, view.shift_N2)
    )
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    together, index = apply_view(images, view[torch.arange(10)]), torch.tensor([7])
    assert torch.equal(apply_view(images[index], view[index]), together[index])


def bank(mode="cached", views=2, augment=None, calls=None):
    splits = load_splits(DataConfig(name="digits", max_per_class=30))

    def extract(images):
        if calls is not None:
            calls.append(len(images))
        return images.float().flatten(1)

    augment = augment or AugmentConfig(flip=True, crop=1)
    return FeatureBank(splits, extract, augment, FeaturesConfig(mode=mode, views=views, batch_size=64), CPU)


def test_the_bank_extracts_each_view_once_and_returns_labels_with_features():
    calls = []
    features = bank(calls=calls)
    assert features.feature_shape == (3 * 8 * 8,)  # which takes an extraction
    calls.clear()
    train = features.splits.train
    order = torch.randperm(len(train))
    for epoch in range(4):
        batches = list(features.batches("train", 50, order, view=epoch))
        labels = torch.cat([labels for _, labels in batches])
        assert torch.equal(labels, train.labels_N[order])
    assert sum(calls) == 2 * len(train)  # two views for any number of epochs
    plain = torch.cat([batch for batch, _ in features.batches("train", 50)])
    assert torch.equal(plain, train.images_NCHW.flatten(1).half())


def test_cached_and_live_modes_give_the_same_numbers():
    cached, live = bank("cached", views=3), bank("live")
    order = torch.randperm(len(cached.splits.train))
    for view in (0, 2):
        for (a, _), (b, _) in zip(
            cached.batches("train", 32, order, view), live.batches("train", 32, order, view), strict=True
        ):
            assert torch.equal(a.float(), b)


def test_without_augmentation_every_view_is_the_image():
    calls = []
    features = bank(augment=AugmentConfig(flip=False, crop=0), calls=calls)
    assert features.feature_shape == (3 * 8 * 8,)  # which takes an extraction
    calls.clear()
    list(features.batches("train", 64, view=0))
    list(features.batches("train", 64, view=1))
    assert sum(calls) == len(features.splits.train)


def test_extraction_by_several_cores_gives_the_same_features(monkeypatch):
    alone = torch.cat([batch for batch, _ in bank().batches("train", 64, view=1)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    together = torch.cat([batch for batch, _ in bank().batches("train", 64, view=1)])
    assert torch.equal(alone, together)


def test_fingerprints_follow_images_and_labels():
    images = image_set([0, 1, 0, 1])
    assert images.fingerprint() == image_set([0, 1, 0, 1]).fingerprint()
    assert images.fingerprint() != image_set([1, 0, 0, 1]).fingerprint()
    assert images.fingerprint() != images.subset(torch.tensor([2, 1, 0, 3])).fingerprint()
