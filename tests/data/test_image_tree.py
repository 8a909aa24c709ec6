"""The rules for images, classes and splits: links, loops, hidden entries, extensions, names of splits, pipes."""

import os

import pytest
from PIL import Image

from common.errors import EnvironmentFault, UserError
from data.datasets import DataConfig, load_splits
from data.image_file import read_picture
from data.image_tree import Skipped, endings, find_classes, find_images, find_splits, label_files


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def labelled(root):
    """{split: {relative path: class}} of the images under `root`, and the lines on what was left out."""
    skipped = Skipped()
    splits = find_splits(root, skipped)
    names = [path.name for path in find_classes(splits["train"], Skipped())]
    found = label_files(splits, names, skipped)
    return {
        split: {str(path.relative_to(root)): names[label] for path, label in files} for split, files in found.items()
    }, skipped


@pytest.fixture
def tree(tmp_path):
    touch(tmp_path, *(f"{split}/{name}/{i}.png" for split in ("train", "val", "test") for name in "ab" for i in (0, 1)))
    return tmp_path


def plain(root, splits=("train", "validation", "test")):
    folders = {"train": "train", "validation": "val", "test": "test"}
    return {s: {f"{folders[s]}/{name}/{i}.png": name for name in "ab" for i in (0, 1)} for s in splits}


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/a/up", ".."),  # all classes below one class
        ("train/a/up", "../.."),  # all splits below one class
        ("train/a/here", "."),
        ("train/loop", "."),  # as a class
        ("train/a/0", "../../train"),
        ("test/b/deep/er", "../../../.."),
    ],
)
def test_a_link_to_a_parent_folder_changes_nothing_and_is_reported(tree, capsys, link, target):
    (tree / link).parent.mkdir(exist_ok=True)
    (tree / link).symlink_to(target, target_is_directory=True)
    found, skipped = labelled(tree)
    assert found == plain(tree)
    skipped.warn()
    line = capsys.readouterr().err
    assert line == f"warning: not followed: it links to a parent folder: {tree / link}\n"


def test_cyclic_links_through_other_folders_end(tmp_path):
    touch(tmp_path, "root/train/a/0.png", "root/train/b/0.png", "far/one/1.png", "far/two/2.png")
    (tmp_path / "root/train/a/one").symlink_to(tmp_path / "far/one")
    (tmp_path / "far/one/two").symlink_to(tmp_path / "far/two")
    (tmp_path / "far/two/one").symlink_to(tmp_path / "far/one")  # a cycle of two links
    (tmp_path / "far/two/train").symlink_to(tmp_path / "root/train")  # and a link back
    found, skipped = labelled(tmp_path / "root")
    a = {"train/a/0.png": "a", "train/a/one/1.png": "a", "train/a/one/two/2.png": "a"}
    assert found == {"train": a | {"train/b/0.png": "b"}}
    assert [path.name for path in skipped.loops] == ["one", "train"]


def test_a_file_has_the_class_and_the_split_of_its_real_folder(tree):
    (tree / "train/a/others").symlink_to("../b")  # images of b as images of a
    (tree / "train/a/seen.png").symlink_to("../../test/a/0.png")  # a test image among the training images
    os.link(tree / "train/b/1.png", tree / "val/b/same.png")  # two names of one file, neither a link
    found, skipped = labelled(tree)
    assert found == plain(tree)
    assert sorted(str(path.relative_to(tree)) for path, _ in skipped.repeated) == [
        "train/a/others/0.png",
        "train/a/others/1.png",
        "train/a/seen.png",
        "val/b/same.png",
    ]


def test_a_folder_that_is_only_a_link_is_followed_once(tmp_path):
    touch(tmp_path, "store/cats/0.png", "store/cats/1.png", "root/train/dog/0.png")
    (tmp_path / "root/train/cat").symlink_to(tmp_path / "store/cats")
    (tmp_path / "root/train/cat_again").symlink_to(tmp_path / "store/cats")
    with pytest.raises(UserError, match=r"train/cat_again has no separate image.*through a link"):
        labelled(tmp_path / "root")
    (tmp_path / "root/train/cat_again").unlink()
    (tmp_path / "root/test").symlink_to("train")
    with pytest.raises(UserError, match=r"root/test has no separate image"):
        labelled(tmp_path / "root")
    (tmp_path / "root/test").unlink()
    assert set(labelled(tmp_path / "root")[0]["train"]) == {"train/cat/0.png", "train/cat/1.png", "train/dog/0.png"}


def test_a_link_loop_does_not_change_the_splits(tmp_path, capsys):
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), (20 * i, 90 * label, count)).save(tmp_path / split / name / f"{i:02d}.png")
    config = DataConfig(name="folder", root=tmp_path, image_size=8)
    before = load_splits(config)
    (tmp_path / "train/a/up").symlink_to("..")
    after = load_splits(config)
    for split in ("train", "validation", "test"):
        assert before[split].fingerprint() == after[split].fingerprint()
    assert capsys.readouterr().err.count("links to a parent") == 1


def test_hidden_files_and_folders_are_ignored(tree, capsys):
    touch(tree, "train/.ipynb_checkpoints/0.png", "train/a/.ipynb_checkpoints/0.png", "train/a/._0.png")
    touch(tree, ".git/x.png", "train/__MACOSX/0.png", "train/a/@eaDir/0.png", "train/a/Thumbs.db", "train/.DS_Store")
    found, skipped = labelled(tree)
    assert found == plain(tree)
    assert [path.name for path in find_images(tree / "train/a")] == ["0.png", "1.png"]
    skipped.warn()
    assert capsys.readouterr().err == ""
    touch(tree, ".mine/0.png")
    assert find_images(tree / ".mine") == [tree / ".mine/0.png"]  # named explicitly


def test_images_can_be_at_any_depth_with_every_readable_extension(tree):
    names = ["day1/x.png", "day1/deeper/y.JFIF", "z.webp", "0.gif", "p.jp2", "camera.mpo", "q.avif"]
    touch(tree, *(f"train/a/{name}" for name in names))
    found, _ = labelled(tree)
    assert {path for path, name in found["train"].items() if name == "a"} == {
        "train/a/0.png",
        "train/a/1.png",
        *(f"train/a/{name}" for name in names if os.path.splitext(name)[1].lower() in endings()),
    }
    assert {".jfif", ".mpo", ".gif", ".webp", ".tiff", ".jp2"} <= endings()
    assert not {".eps", ".ps", ".pdf", ".h5", ".mpg"} & endings()
    in_class = [str(path.relative_to(tree)) for path in find_images(tree / "train/a")]
    assert in_class == [path for path, name in found["train"].items() if name == "a"]  # one rule, one order


def test_left_out_files_are_reported_in_one_line_per_reason(tree, capsys):
    touch(tree, "train/a/x.heic", "train/a/y.heic", "train/a/notes.txt", "train/lost.png", "holdout/a/0.png")
    os.mkfifo(tree / "train/a/pipe.png")
    found, skipped = labelled(tree)
    assert found == plain(tree)
    skipped.warn()
    assert capsys.readouterr().err.splitlines() == [
        f"warning: left out: not the extension of an image (.heic, .txt): {tree}/train/a/notes.txt, and 2 more",
        f"warning: left out: not a regular file: {tree}/train/a/pipe.png",
        f"warning: left out: not in a class folder: {tree}/train/lost.png",
        "warning: left out: not the name of a split (train, training, val, valid, validation, dev, test, "
        f"testing): {tree}/holdout",
    ]


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
        read_picture(tmp_path / "pipe.png", 8)
    with pytest.raises(UserError, match="no file with the extension of an image"):
        find_images(tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "round.png").symlink_to("round.png")
    assert [path.name for path in find_images(tmp_path)] == ["gone.png", "round.png"]
    for name, words in (("gone", "is a broken link"), ("round", "cannot be read as an image")):
        with pytest.raises(UserError, match=words):
            read_picture(tmp_path / f"{name}.png", 8)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "dev"])
def test_a_validation_folder_can_have_any_of_its_names(tree, name):
    (tree / "val").rename(tree / name)
    assert set(labelled(tree)[0]["validation"].values()) == {"a", "b"}
    touch(tree, "VALID/a/0.png")
    if name != "VALID":
        with pytest.raises(UserError, match=r"has both .* keep the one to use as validation"):
            labelled(tree)


def test_a_folder_that_cannot_be_read_is_reported_in_one_line(tree, monkeypatch):
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(EnvironmentFault, match="train/b cannot be read: Permission denied"):
        labelled(tree)


def test_a_folder_gives_its_images_in_order(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", ".hidden.png", "c.txt", "sub/d.webp")
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.PNG", "d.webp"]
    assert find_images(tmp_path / "c.txt") == [tmp_path / "c.txt"]  # named explicitly


def test_prediction_follows_links_by_the_same_rule(tree, capsys):
    album = tree / "album"
    touch(album, "0.png")
    (album / "b").symlink_to("../test/b")
    (album / "self").symlink_to(".")
    (album / "again.png").symlink_to("0.png")
    assert [path.relative_to(album).as_posix() for path in find_images(album)] == ["0.png", "b/0.png", "b/1.png"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: not followed: it links to a parent folder: {album}/self",
        f"warning: counted once: {album}/again.png is {album}/0.png by another name",
    ]
