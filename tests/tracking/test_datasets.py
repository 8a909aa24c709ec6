"""A ClearML dataset as data.root, with the SDK replaced."""

import pytest

from assembly.replay import fetch_data
from common.errors import EnvironmentFault, UserError
from config.command_line import parse_command_line
from tracking import datasets


class Found:
    def __init__(self, folder):
        self.folder = folder

    def get_local_copy(self):
        if self.folder is None:
            raise OSError("disk full")
        return str(self.folder)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The requests to Dataset.get, on a server that has pets/cats and broken."""
    import clearml  # here, because it takes a second

    asked = []

    def get(**wanted):
        asked.append({key: value for key, value in wanted.items() if key.startswith("dataset")})
        name = wanted.get("dataset_name") or wanted["dataset_id"]
        if name == "none":
            raise ValueError("Could not find Dataset\nnone")
        return Found(None if name == "broken" else tmp_path)

    monkeypatch.setattr(datasets, "server_problem", lambda: None)
    monkeypatch.setattr(clearml.Dataset, "get", get)
    monkeypatch.setattr(clearml.Task, "set_offline", lambda offline: None)
    return asked


def test_images_are_read_from_the_local_copy(asked, tmp_path):
    config = parse_command_line(["--config", "configs/folder.yaml", "--data.clearml_dataset", "pets/cats"]).config
    fetch_data(config)
    assert config.data.root == tmp_path
    assert datasets.fetch_dataset("0" * 32) == datasets.fetch_dataset("cats") == tmp_path
    assert asked == [
        {"dataset_name": "cats", "dataset_project": "pets"},
        {"dataset_id": "0" * 32},
        {"dataset_name": "cats", "dataset_project": None},
    ]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("none", UserError, "data.clearml_dataset none is not a finished dataset on the ClearML server"),
        ("pets/broken", EnvironmentFault, r"dataset pets/broken cannot be downloaded \(OSError: disk full\)"),
    ],
)
def test_a_missing_dataset_is_reported_in_one_line(asked, name, kind, words):
    with pytest.raises(kind, match=words) as caught:
        datasets.fetch_dataset(name)
    assert "\n" not in str(caught.value)


def test_without_a_server_and_without_a_name(monkeypatch):
    monkeypatch.setattr(datasets, "server_problem", lambda: UserError("no ClearML server is configured"))
    with pytest.raises(UserError, match="no ClearML server is configured"):
        datasets.fetch_dataset("pets/cats")
    with pytest.raises(UserError, match=r"data\.clearml_dataset is '/': give PROJECT/NAME or an id"):
        parse_command_line(["--data.clearml_dataset=/"])
