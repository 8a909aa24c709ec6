"""The dense twin: one part with the cost of the whole mixture, in the same place."""

import json

import pytest
import torch

from assembly.pipeline import build_model
from assembly.twin import _nearest, _scaled, twin_of
from common.errors import UserError
from config.command_line import parse_command_line
from evaluation.cost import trained_cost
from model.backbone import load_backbone

DIGITS, BLOCKS = "configs/digits.yaml", "configs/digits_blocks.yaml"
SHAPE, CLASSES = (17, 24), 10


def configure(file, *words):
    return parse_command_line(["--config", file, "--dense_twin", "true", *words]).config


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--router.hidden", "[64]"],
        ["--router.kind", "deepseek", "--experts.shared", "[[300]]"],
        ["--router.kind", "expert_choice"],
        ["--experts.kind", "glu"],
        ["--experts.sizes", "[small,medium,large,very_large]"],
        ["--experts.sizes", "[[],[],[]]", "--experts.dropout", "[0.1,0.2,0.3]"],
        ["--neck.kind", "tokens", "--router.kind", "soft_moe", "--router.slots", "3"],
    ],
)
def test_behind_the_vit_the_twin_has_the_cost_of_the_mixture(words):
    config = configure(DIGITS, *words)
    twin = twin_of(config, SHAPE, CLASSES)
    mine, theirs = (trained_cost(build_model(one, SHAPE, CLASSES), SHAPE).flops for one in (twin, config))
    assert mine == pytest.approx(theirs, rel=0.03)  # the nearest whole number of units
    assert len(twin.experts.sizes) == 1 and not twin.experts.shared and twin.router.top_k == 1
    assert (twin.optim, twin.neck, twin.train.epochs) == (config.optim, config.neck, config.train.epochs)
    replaced = json.loads(twin.twin_of)
    assert replaced["experts.sizes"] == config.experts.sizes
    assert "parallel.experts" not in replaced and not any(key.startswith("train.") for key in replaced)


def test_the_width_by_hand():
    # LayerNorm has no product. Gate 4 experts: 408 * 4; two experts of a mean of 60 units: 2 * 60 * (408 + 10), so
    # 408 w + 408 (a gate of one) + 10 w = 1,632 + 50,160: w = 122.9.
    assert twin_of(configure(DIGITS), SHAPE, CLASSES).experts.sizes == [[123]]


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [([], 0.02), (["--router.level", "image"], 0.02), (["--experts.head", "[[4],[8],[16],[32]]"], 0.02)],
)
def test_inside_the_vit_too(words, tolerance):
    config = configure(BLOCKS, *words)
    backbone = load_backbone(config.backbone, torch.device("cpu"))
    shape = (3 * 192,)
    twin = twin_of(config, shape, CLASSES, backbone)
    mine, theirs = (trained_cost(build_model(one, shape, CLASSES, backbone), shape).flops for one in (twin, config))
    assert mine == pytest.approx(theirs, rel=tolerance)
    assert (twin.experts.place, twin.experts.blocks) == ("blocks", config.experts.blocks)
    assert len(twin.experts.head) == len(config.experts.head) / 4


def test_copies_of_the_ffn_have_a_fixed_size_and_a_cheaper_twin_is_reported(capsys):
    config = configure(BLOCKS, "--experts.kind", "ffn", "--experts.sizes", "[[768],[768],[768]]")
    backbone = load_backbone(config.backbone, torch.device("cpu"))
    assert twin_of(config, (576,), CLASSES, backbone).experts.sizes == [[768]]
    assert "the dense twin has 115 M FLOPs per image, the mixture 230 M" in capsys.readouterr().err


def test_the_nearest_size():
    assert [_nearest(lambda units: 10 * units, goal) for goal in (1, 10, 14, 16, 999)] == [1, 1, 1, 2, 100]
    assert _scaled([8, 4, 1], 2) == [2, 1, 1]


def test_the_replaced_options_of_a_twin_cannot_be_set_alone():
    with pytest.raises(UserError, match=r"twin_of is set by dense_twin: leave it out"):
        parse_command_line(["--twin_of", "{}"])
