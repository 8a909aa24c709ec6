"""The registry of datasets: its entries, its users, and a dataset from a plug-in."""

import pytest
import torch

from common.errors import UserError
from config.command_line import parse_command_line
from config.config import Config
from config.help import help_text
from data.datasets import DATASETS, DataConfig, load_splits, register
from data.image_set import ImageSet
from evaluation.predict_options import _sides


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_each_dataset_is_explained_and_can_be_chosen(name):
    found = DATASETS[name]
    assert set(found.options) <= set(DataConfig.__dataclass_fields__)
    assert f"{name}: {found.about}" in " ".join(help_text(Config()).split())
    config = parse_command_line(["--data.name", name]).config.data
    assert config.name == name and config.side == (found.side or 224) and config.grey == found.grey
    assert (config.root is not None) == (found.default_root is not None)
    if found.side:
        assert f"{found.side} pixels for {name}" in " ".join(_sides())


@pytest.fixture
def toy():
    """A dataset as from a plug-in: two colours, with a separate test set."""
    before = dict(DATASETS)

    @register("toy", about="two colours", options=("image_size",), published=True)
    def load(config):
        labels = torch.arange(40) % 2
        images = (255 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, config.side, config.side)
        return ImageSet(images, labels, ("black", "white")), None, ImageSet(images[:4], labels[:4], ("black", "white"))

    yield load
    DATASETS.clear()
    DATASETS.update(before)


def test_a_dataset_from_a_plugin_is_used_like_the_others(toy):
    splits = load_splits(DataConfig(name="toy", image_size=16))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [36, 4, 4]
    assert splits.train.images_NCHW.shape[1:] == (3, 16, 16)
    assert parse_command_line(["--data.name", "toy"]).config.data.name == "toy"
    with pytest.raises(ValueError, match="'toy' is already registered"):
        register("toy", about="again")(toy)


def test_an_unknown_dataset_is_reported_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^data\.name is 'toy': use one of arrays, cifar100, digits, folder"):
        DataConfig(name="toy")
    with pytest.raises(UserError, match=r"data\.name is 'toy'"):
        parse_command_line(["--data.name", "toy"])
    for name in ("folder", "arrays"):
        with pytest.raises(UserError, match=rf"data\.name {name} needs --data\.root: name "):
            load_splits(DataConfig(name=name))


def test_options_that_a_dataset_does_not_read_are_reported(tmp_path, capsys):
    config = DataConfig(name="digits", image_size=64, download=False, max_per_class=20)
    assert config.idle == [
        "data.download False has no effect with data.name digits: only cifar100 reads it",
        "data.image_size 64 has no effect with data.name digits: only arrays and folder read it",
    ]
    load_splits(config)
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in config.idle]
    assert len(DataConfig(name="digits", root=tmp_path).idle) == 1
    assert DataConfig().idle == DataConfig(name="folder", root=tmp_path, image_size=8).idle == []
