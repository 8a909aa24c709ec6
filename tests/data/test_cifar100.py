"""CIFAR-100: missing, altered and archived files, and the labels of the real ones."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from common.errors import EnvironmentFault, UserError
from data.datasets import DataConfig, load_splits
from data.datasets.cifar100 import load_cifar100


def test_missing_cifar_says_where_it_looked_and_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("data.datasets.cifar100.reachable", lambda url: False)
    with pytest.raises(EnvironmentFault) as caught:
        load_splits(DataConfig(root=tmp_path))
    message = str(caught.value)
    for part in (
        "train, test, meta not found",
        str(tmp_path / "cifar-100-python"),
        "--data.root",
        "configs/digits.yaml",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"--data\.download is false"):
        load_splits(DataConfig(root=tmp_path, download=False))


def test_naming_the_cifar_folder_instead_of_its_parent_is_reported(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).touch()
    with pytest.raises(UserError, match=f"files of CIFAR-100: name its parent, --data.root {tmp_path}$"):
        load_splits(DataConfig(root=folder))
    with pytest.raises(UserError, match=r"move them to .*mine/cifar-100-python$"):
        load_splits(DataConfig(root=folder.rename(tmp_path / "mine")))


def test_altered_cifar_files_are_rejected_before_they_are_unpickled(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemError('code from a data file ran')",))

    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"train is not the official file of CIFAR-100 .*delete it"):
        load_splits(DataConfig(root=tmp_path))


def test_an_archive_at_hand_is_unpacked_once_its_checksum_matched(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import CIFAR100

    def batch(count):
        pixels = np.zeros((count, 3072), np.uint8)
        return {b"data": pixels, b"fine_labels": [0, 1] * count, b"coarse_labels": [0] * count}

    contents = {name: pickle.dumps(batch(2) | {b"fine_labels": [0, 1]}) for name in ("train", "test")}
    contents["meta"] = pickle.dumps({"fine_label_names": ["a", "b"], "coarse_label_names": ["c"]})
    archive = tmp_path / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as members:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    monkeypatch.setattr("data.datasets.cifar100.reachable", lambda url: False)
    with pytest.raises(UserError, match=r"cifar-100-python\.tar\.gz is not the official file"):
        load_cifar100(tmp_path)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    for _ in range(2):  # the second time from the files
        train, test = load_cifar100(tmp_path, download=False)
        assert (len(train), len(test), train.class_names) == (2, 2, ("a", "b"))
    assert capsys.readouterr().err.count("unpacking CIFAR-100 from") == 1


@pytest.mark.slow
def test_real_cifar_has_fine_and_coarse_labels(assets):
    splits = load_splits(DataConfig(root=assets))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
    assert torch.bincount(splits.train.labels_N).tolist() == [450] * 100
    assert torch.bincount(splits.validation.labels_N).tolist() == [50] * 100
    groups = splits.test.superclass_of_class()
    assert np.bincount(groups).tolist() == [5] * 20
    apple = splits.test.class_names.index("apple")
    assert splits.test.coarse_names[groups[apple]] == "fruit_and_vegetables"
