"""Arrays as a dataset: .npz files of every usual shape, Parquet files, and invalid files."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import EnvironmentFault, UserError
from data.datasets import DataConfig, load_splits
from data.datasets.arrays import load
from data.image_file import read_picture

GREY = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(20) % 2


def parts(path, size=8):
    return load(DataConfig(name="arrays", root=path, image_size=size))


def saved(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(0, 3, 1, 2), RGB),
        (RGB / 255, RGB),
        (RGB.astype(np.float32), RGB),
        (RGB.astype(np.int64), RGB),
        (GREY, GREY[..., None].repeat(3, axis=3)),
        (GREY[..., None], GREY[..., None].repeat(3, axis=3)),
        (GREY[:, None] / 255, GREY[..., None].repeat(3, axis=3)),
        (GREY > 127, np.where(GREY > 127, 255, 0)[..., None].repeat(3, axis=3)),
    ],
)
def test_images_of_any_layout_and_range_are_the_same_pixels(tmp_path, images, expected):
    train, validation, test = parts(saved(tmp_path, images=images, labels=LABELS))
    assert validation is None and test is None
    assert train.images_NCHW.dtype == torch.uint8
    assert np.array_equal(train.images_NCHW.permute(0, 2, 3, 1).numpy(), expected)
    assert train.labels_N.tolist() == LABELS.tolist() and train.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "more", "names", "numbers"),
    [
        (LABELS, {"names": np.array(["cat", "dog"])}, ("cat", "dog"), LABELS),
        (LABELS, {"class_names": np.array(["cat", "dog", "eel"])}, ("cat", "dog", "eel"), LABELS),
        (LABELS[:, None].astype(np.uint8), {}, ("0", "1"), LABELS),
        (LABELS.astype(np.float64), {}, ("0", "1"), LABELS),
        (3 + 4 * LABELS, {}, ("3", "7"), LABELS),  # the classes are the labels that occur
        (np.array(["owl", "ant"])[LABELS], {}, ("ant", "owl"), 1 - LABELS),
        (np.array(["owl", "ant"])[LABELS], {"names": np.array(["owl", "ant"])}, ("owl", "ant"), LABELS),
    ],
)
def test_labels_are_integers_or_strings_with_or_without_names(tmp_path, labels, more, names, numbers):
    train, *_ = parts(saved(tmp_path, images=GREY, labels=labels, **more))
    assert train.class_names == names and train.labels_N.tolist() == numbers.tolist()


@pytest.mark.parametrize("names", [("train_{}", "val_{}", "test_{}"), ("{}_train", "{}_valid", "{}_test")])
@pytest.mark.parametrize(("x", "y"), [("images", "labels"), ("x", "y")])
def test_a_file_can_contain_splits(tmp_path, names, x, y):
    sizes = (20, 6, 4)
    arrays = {name.format(x): GREY[:size] for name, size in zip(names, sizes, strict=True)}
    arrays |= {name.format(y): LABELS[:size] for name, size in zip(names, sizes, strict=True)}
    assert [len(part) for part in parts(saved(tmp_path, **arrays))] == [20, 6, 4]


def test_images_are_resized_as_their_files_are(tmp_path, capsys):
    wide = np.random.default_rng(2).integers(0, 256, (4, 20, 36, 3), dtype=np.uint8)
    train, *_ = parts(saved(tmp_path, images=wide, labels=LABELS[:4]), size=12)
    Image.fromarray(wide[1]).save(tmp_path / "1.png")
    assert torch.equal(train.images_NCHW[1], read_picture(tmp_path / "1.png", 12).pixels_CHW)
    assert capsys.readouterr().err == ""
    parts(saved(tmp_path, images=wide, labels=LABELS[:4]), size=32)
    assert "20 x 36 are enlarged to 32 x 32: --data.image_size 20 keeps them" in capsys.readouterr().err


def test_missing_splits_are_drawn_and_duplicates_between_splits_are_reported(tmp_path, capsys):
    path = saved(tmp_path, images=np.concatenate([RGB, RGB]), labels=np.concatenate([LABELS, LABELS]))
    splits = load_splits(DataConfig(name="arrays", root=path, image_size=8, validation=0.2))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [25, 7, 8]
    seen = {image.numpy().tobytes() for name in ("train", "validation") for image in splits[name].images_NCHW}
    copies = sum(image.numpy().tobytes() in seen for image in splits.test.images_NCHW)
    assert f"{copies} of 8 test images are exact copies of images in another split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": GREY}, "contains pictures: expected the arrays images and labels"),
        ({"images": GREY}, "expected the arrays images and labels"),
        ({"test_images": GREY, "test_labels": LABELS}, "has only test images: the training images are missing"),
        ({"images": GREY[0], "labels": LABELS}, r"images in .* has the shape \(8, 8\)"),
        ({"images": RGB[..., :2], "labels": LABELS}, "expected .*N, H, W, 3"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "has the shape"),
        ({"images": GREY * 1000.0, "labels": LABELS}, "values outside 0 to 255"),
        ({"images": np.full((20, 8, 8), np.nan), "labels": LABELS}, "values outside 0 to 255"),
        ({"images": GREY.astype(complex), "labels": LABELS}, "values outside 0 to 255"),
        ({"images": GREY, "labels": LABELS[:5]}, "has 20 train images but 5 labels"),
        ({"images": GREY, "labels": np.eye(2)[LABELS]}, r"labels in .* has the shape \(20, 2\)"),
        ({"images": GREY, "labels": LABELS + 0.5}, "has type float64: expected integers or strings"),
        ({"images": GREY, "labels": 0 * LABELS}, "has 1 class"),
        ({"images": GREY, "labels": LABELS - 1}, "has the train label -1: leave out images without a label"),
        ({"images": GREY, "labels": LABELS, "names": np.array(["a"])}, "has 1 class"),
        ({"images": GREY, "labels": 2 * LABELS, "names": np.array(["a", "b"])}, "labels from 0 to 2: its 2 classes"),
        ({"images": GREY, "labels": LABELS, "names": np.array(["a", "a"])}, "two classes have the name 'a'"),
        (
            {"images": GREY, "labels": LABELS, "test_images": GREY, "test_labels": 2 * LABELS},
            "has the test label '2', which no training image has",
        ),
        ({"images": GREY, "labels": np.array([{}] * 20)}, "not an .npz file of plain arrays .*allow_pickle"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(tmp_path, arrays, words):
    with pytest.raises(UserError, match=words) as caught:
        parts(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_a_file_without_arrays_is_reported_in_one_line(tmp_path, monkeypatch):
    whole = saved(tmp_path, images=GREY, labels=LABELS).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:400] + bytes(200) + whole[600:]):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"not an \.npz file of plain arrays"):
            parts(tmp_path / "b.npz")
    with pytest.raises(UserError, match="does not exist"):
        parts(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"needs --data\.root: name an \.npz file"):
        parts(None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"has no \.parquet file"):
        parts(tmp_path / "folder")
    monkeypatch.setattr("data.datasets.arrays.available_memory", lambda: 1000)
    with pytest.raises(EnvironmentFault, match="GB of memory are free"):
        parts(tmp_path / "a.npz")
    monkeypatch.undo()
    monkeypatch.setattr("data.image_set.available_memory", lambda: 1000)
    with pytest.raises(EnvironmentFault, match=r"20 images of 8 x 8 pixels need .*lower --data\.image_size"):
        parts(tmp_path / "a.npz")


def encoded(pixels_HWC):
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional: pip install pyarrow")


def hub(path, rows, labels, names=None, **columns):
    """A Parquet file in the format of the Hugging Face Hub."""
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": encoded(row), "path": None} for row in rows]
    table = pyarrow.table({"img": images, "fine_label" if names else "label": labels, **columns})
    if names:
        features = {"img": {"_type": "Image"}, "fine_label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def test_parquet_files_of_the_hub_are_read_with_their_splits_and_names(tmp_path, parquet):
    names = ["cat", "dog"]
    hub(tmp_path / "data/train-00000-of-00002.parquet", RGB[:10], LABELS[:10].tolist(), names)
    hub(tmp_path / "data/train-00001-of-00002.parquet", RGB[10:], LABELS[10:].tolist(), names)
    hub(tmp_path / "default/test/0000.parquet", RGB[:4], LABELS[:4].tolist(), names)
    hub(tmp_path / ".cache/data/train-0.parquet", RGB, LABELS.tolist(), names)  # hidden: ignored
    train, validation, test = parts(tmp_path)
    assert validation is None and train.class_names == ("cat", "dog")
    assert np.array_equal(train.images_NCHW.permute(0, 2, 3, 1).numpy(), RGB)
    assert train.labels_N.tolist() == LABELS.tolist() and test.labels_N.tolist() == LABELS[:4].tolist()


def test_invalid_parquet_files_are_reported_in_one_line(tmp_path, parquet):
    import pyarrow

    path = tmp_path / "train.parquet"

    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            parts(tmp_path)
        assert "\n" not in str(caught.value)

    parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), path)
    refused("has the columns text, label: expected one with the bytes of image files")
    parquet.write_table(pyarrow.table({"image": [b"no image"], "label": [0]}), path)
    refused("the image in row 0 of .* cannot be read as an image")
    parquet.write_table(pyarrow.table({"image": [encoded(RGB[0])], "label": [None]}), path)
    refused("expected integers or strings")
    parquet.write_table(pyarrow.table({"image": [{"bytes": None, "path": "x.png"}], "label": [0]}), path)
    refused("has the columns image, label|has no bytes of an image")
    path.write_bytes(b"PAR1 cut")
    refused("not a readable Parquet file")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r"train\.parquet can only be read with pyarrow: pip install pyarrow"):
        parts(tmp_path)
