"""Too few images, classes missing from a split, unreadable images: one line before training."""

import resource

import pytest
import torch
from PIL import Image

import train
from common.errors import UserError, exit_code_of
from config.command_line import parse_command_line
from data.datasets import DataConfig, load_splits
from data.image_file import read_picture
from data.image_set import ImageSet
from training.length import steps_per_epoch


def folder_of_images(root, counts):
    """ROOT/SPLIT/CLASS/N.png for {"SPLIT/CLASS": how many}."""
    for number, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 9), (index, number, 0)).save(root / place / f"{index}.png")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train/a": 9}, "has 1 class folder"),
        ({"train/a": 1}, "has 1 class folder"),
        ({"train/a": 9, "train/b": 1}, "class 'b' has 1 image"),
        ({"train/a": 9, "train/b": 0}, "b has no image"),
        ({"train/a": 9, "train/b": 9, "val/a": 0}, "val has no image"),
        ({"train/a": 9, "train/b": 9, "test/c": 1}, "class folder 'c' that train/ does not have"),
    ],
)
def test_too_little_data_is_reported_in_one_line(tmp_path, counts, words):
    folder_of_images(tmp_path, counts)
    with pytest.raises(UserError, match=words) as caught:
        load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))
    assert "\n" not in str(caught.value)


def test_twenty_images_are_enough_for_the_recipe_for_your_own_images(tmp_path):
    for name, counts in {"two": {"a": 10, "b": 10}, "four": dict.fromkeys("abcd", 5)}.items():
        folder_of_images(tmp_path / name, {f"train/{label}": count for label, count in counts.items()})
        words = ["--config", "configs/folder.yaml", "--data.root", str(tmp_path / name)]
        config = parse_command_line(words).config
        parts = load_splits(config.data)
        assert all(set(part.labels_N.tolist()) == set(range(len(counts))) for part in vars(parts).values())
        assert steps_per_epoch(config.train, len(parts.train)) == 2


def test_a_class_missing_from_a_split_is_reported_before_training(tmp_path, capsys):
    folder_of_images(tmp_path, {"train/a": 9, "train/b": 9, "val/a": 2, "test/b": 2, "test/a": 1})
    load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the validation split has no image of 1 of the 2 classes ('b')" in line


def test_labels_out_of_range_are_rejected():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for labels in ([0, 1, 2], [0, -1, 1], [0, 1]):
        with pytest.raises(UserError, match=r"labels|images"):
            ImageSet(images, torch.tensor(labels), ("a", "b"))


def test_images_that_cannot_be_read_are_counted_and_the_first_is_named(tmp_path):
    folder_of_images(tmp_path, {"train/a": 4, "train/b": 4})
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/b/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image .*\(2 of 8 files in"):
        load_splits(DataConfig(name="folder", root=tmp_path, image_size=8))


def test_images_that_exceed_the_memory_are_rejected(tmp_path):
    Image.new("L", (4, 60_000), 7).save(tmp_path / "thin.png")  # 224 x 3 million pixels if its width became 224
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_picture(tmp_path / "thin.png", 224).pixels_CHW.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    (tmp_path / "claim.ppm").write_bytes(b"P6 9000 9000 255 ")
    with pytest.raises(UserError, match=r"it claims 9000 x 9000 pixels in 17 bytes"):
        read_picture(tmp_path / "claim.ppm", 8)
    (tmp_path / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"code\.png cannot be read"):  # PostScript is a program: no interpreter is run
        read_picture(tmp_path / "code.png", 8)


def test_an_option_without_effect_is_reported_before_the_data_is_read(tmp_path, monkeypatch, capsys):
    words = ["--config", "configs/digits.yaml", "--router.jitter", "0.5", "--data.name", "folder"]
    monkeypatch.setattr("sys.argv", ["train.py", *words, "--data.root", str(tmp_path / "none")])
    assert exit_code_of(train.main) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: router.jitter 0.5 has no effect with router.kind noisy_topk: only switch reads it"
    assert error.startswith("error: ")
