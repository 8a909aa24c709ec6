"""Every number among the options of data, augmentation and features, at its extremes: a run, or one line."""

import math
from dataclasses import fields, replace

import pytest
import torch
from conftest import mostly_slow

from common.errors import UserError
from config.features import FeaturesConfig
from data.augment import AugmentConfig
from data.datasets import DataConfig, load_splits
from features.bank import FeatureBank

PARTS = {
    "data": DataConfig(name="digits", max_per_class=20),
    "augment": AugmentConfig(),
    "features": FeaturesConfig(cache_dir=None),
}
NUMBERS = [0.0, -1.0, 1e-300, 0.05, 0.999, 1.0, 1e300, math.inf, -math.inf, math.nan]
WHOLE = [0, -1, 1, 2, 2**31, 10**14, 2**63 - 1, 2**64, 10**30]


def options():
    for part, config in PARTS.items():
        for option in fields(config):
            if option.type in (float, int, int | None):
                yield part, option.name, NUMBERS if option.type is float else WHOLE


@pytest.fixture(scope="module")
def splits():
    return load_splits(PARTS["data"])


@pytest.mark.parametrize(("part", "name", "values"), list(options()))
@pytest.mark.parametrize("mode", mostly_slow(["cached", "live"], ["cached"]))
def test_an_option_at_its_extremes_runs_or_is_reported_in_one_line(splits, part, name, values, mode):
    for value in values:
        try:
            changed = PARTS | {"features": replace(PARTS["features"], mode=mode)}
            changed[part] = replace(changed[part], **{name: value})
            images = load_splits(changed["data"]) if part == "data" else splits
            augment, features = changed["augment"], changed["features"]
            bank = FeatureBank(images, lambda x: x.float().flatten(1), augment, features, torch.device("cpu"))
            served = sum(len(labels) for _, labels in bank.batches("train", 64, view=0))
            assert served == len(images.train)
        except (UserError, ValueError) as error:  # ValueError: of a configuration, which the command line shows
            assert "\n" not in str(error) and name in str(error), (value, error)
