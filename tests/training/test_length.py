"""Length of a training run: its steps, the random warm-up, and the warning about runs that take days."""

import pytest
import yaml
from conftest import ROOT

from common.errors import UserError
from config.command_line import parse_command_line
from config.train import TrainConfig
from model.routers import ROUTERS
from training.length import DAY, Pace, check_warmup, shorten_warmup, steps_per_epoch


def test_steps_by_hand():
    assert steps_per_epoch(TrainConfig(batch_size=4), 10) == 3
    assert steps_per_epoch(TrainConfig(batch_size=10), 10) == 1
    with pytest.raises(UserError, match=r"train\.batch_size 11 is larger than the 10 training images"):
        steps_per_epoch(TrainConfig(batch_size=11), 10)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_trains_for_one_epoch(path, capsys):
    """The random warm-up, if there is one, is at most half of the steps."""
    images = 1000 if yaml.safe_load(path.read_text())["train"]["batch_size"] <= 128 else 45_000
    given = parse_command_line(["--config", str(path), "--train.epochs", "1"]).config
    config = shorten_warmup(given, images)
    steps = steps_per_epoch(config.train, images)
    check_warmup(config.router.random_steps, steps)
    assert config.router.warmup_steps == min(given.router.warmup_steps, steps // 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (given.router.warmup_steps > steps // 2)
    assert all(
        f"more than half of the {steps} steps: only {steps // 2} steps route at random" in line for line in lines
    )
    assert shorten_warmup(config, images) == config and not capsys.readouterr().err  # once, also where it is resumed


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_warm_up_of_every_rule_fits_a_single_step(kind):
    words = ["--config", "configs/digits.yaml", "--router.kind", kind, "--train.epochs", "1", "--train.batch_size", "8"]
    words += ["--router.top_k", "1"] if kind == "switch" else []
    tokens = ["--neck.kind", "tokens", "--backbone.features", "[tokens:-1]", "--router.hidden", "[]"]
    config = parse_command_line([*words, *(tokens if ROUTERS[kind].reads_tokens else []), *hidden(kind)]).config
    check_warmup(shorten_warmup(config, 8).router.random_steps, 1)


def hidden(kind):
    return [] if ROUTERS[kind].learns else ["--router.hidden", "[]"]


def test_a_warm_up_that_never_ends_is_rejected():
    check_warmup(4, 5)
    with pytest.raises(UserError, match=r"router\.warmup_steps 5 routes all 5 steps at random"):
        check_warmup(5, 5)


def test_very_long_training_is_reported_once(capsys):
    pace = Pace(epochs=2**63 - 1, views=0)
    pace.check(1, 0.5)
    pace.check(2, 0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "take 53,375,995,583,650 days or more at 0.5 s per epoch: lower --train.epochs" in line
    )  # (2^63 - 2) / 172,800
    pace = Pace(epochs=100, views=0)
    pace.check(99, DAY - 1)  # one is left
    assert not capsys.readouterr().err
    pace.check(98, DAY / 2)
    assert "take 24 hours" in capsys.readouterr().err


def test_epochs_that_extract_features_do_not_count_for_the_others(capsys):
    pace = Pace(epochs=1_000_000, views=3)
    pace.check(1, 600)  # two more such epochs, and 999,997 quick ones
    assert not capsys.readouterr().err
    pace.check(3, 0.1)
    assert "take 28 hours" in capsys.readouterr().err
