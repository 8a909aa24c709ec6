"""An image folder as a dataset: its splits, its errors, its images."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.datasets import DataConfig, load_splits
from data.image_file import read_picture
from data.splits import few_of_each


def write_images(folder, count, color, size=(20, 12)):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, color).save(folder / f"{index}.png")


def test_image_folder_with_and_without_its_own_splits(tmp_path):
    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        write_images(tmp_path / "train" / name, 10, color)
    splits = load_splits(DataConfig(name="folder", root=tmp_path, image_size=16))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [14, 2, 4]
    assert splits.train.class_names == ("cat", "dog")
    assert splits.train.images_NCHW.shape[1:] == (3, 16, 16)
    red = splits.train.images_NCHW[splits.train.labels_N == 0]
    assert torch.all(red[:, 0] == 255) and torch.all(red[:, 2] == 0)
    write_images(tmp_path / "test" / "dog", 3, (0, 0, 255))
    write_images(tmp_path / "val" / "cat", 2, (255, 0, 0))
    splits = load_splits(DataConfig(name="folder", root=tmp_path, image_size=16))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [20, 2, 3]
    assert splits.test.labels_N.tolist() == [1, 1, 1]


def test_image_folder_errors_name_the_path(tmp_path):
    config = DataConfig(name="folder", root=tmp_path)
    with pytest.raises(UserError, match="train is not a folder"):
        load_splits(config)
    write_images(tmp_path / "train" / "cat", 4, (1, 2, 3))
    with pytest.raises(UserError, match="1 class folder"):
        load_splits(config)
    write_images(tmp_path / "train" / "dog", 4, (1, 2, 3))
    (tmp_path / "train" / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        load_splits(config)
    (tmp_path / "train" / "dog" / "broken.png").unlink()
    write_images(tmp_path / "test" / "bird", 1, (1, 2, 3))
    with pytest.raises(UserError, match="class folder 'bird'"):
        load_splits(config)
    for name in ("train", "test"):
        with pytest.raises(UserError, match=f"is the {name} folder of a dataset: name its parent, {tmp_path}$"):
            load_splits(DataConfig(name="folder", root=tmp_path / name))
    (tmp_path / "train" / "val").mkdir()  # a class of that name, and no data set above it
    with pytest.raises(UserError, match="val/train is not a folder"):
        load_splits(DataConfig(name="folder", root=tmp_path / "train" / "val"))


def test_sixteen_bits_are_scaled_and_rotated_photos_are_rotated_back(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = read_picture(tmp_path / "deep.png", 64).pixels_CHW
    assert pixels[0, 0, 0] == 0 and pixels[0, 0, -1] == 255
    assert 120 < pixels.float().mean() < 135
    turned = Image.new("RGB", (20, 20), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 20, 10))  # white above black
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png", 20).pixels_CHW[0, 0, 0] == 0


def test_empty_classes_and_empty_splits_are_named(tmp_path):
    write_images(tmp_path / "train" / "cat", 6, (1, 2, 3))
    write_images(tmp_path / "train" / "dog", 6, (1, 2, 3))
    write_images(tmp_path / "train" / "eel", 6, (1, 2, 3))
    write_images(tmp_path / "val" / "eel", 2, (1, 2, 3))
    with pytest.raises(UserError, match="the validation split has no image"):
        load_splits(DataConfig(name="folder", root=tmp_path, max_classes=2))
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(UserError, match="fox has no image"):
        load_splits(DataConfig(name="folder", root=tmp_path))


def test_class_folders_without_splits_are_split_with_a_reported_seed(tmp_path, capsys):
    for label, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        write_images(tmp_path / label, 20, color)
    config = DataConfig(name="folder", root=tmp_path, image_size=16, split_seed=3)
    splits = load_splits(config)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [28, 4, 8]
    assert splits.train.class_names == ("cat", "dog")
    said = capsys.readouterr().err
    assert "data.split_seed 3" in said and "name is not that of a split" not in said
    assert all(torch.bincount(splits[name].labels_N).unique().numel() == 1 for name in ("train", "validation", "test"))


def test_a_few_images_per_class(splits, capsys):
    one, five, other = (few_of_each(splits.train, *of) for of in ((1, 0), (5, 0), (5, 1)))
    assert torch.bincount(five.labels_N).tolist() == [5] * 10 and len(one) == 10
    assert {image.numpy().tobytes() for image in one.images_NCHW} <= {i.numpy().tobytes() for i in five.images_NCHW}
    assert five.fingerprint() != other.fingerprint()
    assert len(few_of_each(splits.train, 10**6, 0)) == len(splits.train) and "data.shots" in capsys.readouterr().err
    config = DataConfig(name="digits", max_per_class=40, shots=2)
    few = load_splits(config)
    assert len(few.train) == 20 and few.test.fingerprint() == splits.test.fingerprint()
    with pytest.raises(ValueError, match="at least 1"):
        DataConfig(name="digits", shots=0)
