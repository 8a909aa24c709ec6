"""Every numeric option of the head at its extremes: it trains, or one line says what is wrong."""

import math
from dataclasses import fields

import pytest
import torch

from config.optim import OptimConfig
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.old_gate import hold_old_gates
from model.routers import ROUTERS, RouterConfig
from training.optim import build_optimizer
from training.step import TrainingStep

PARTS = {
    "router": RouterConfig,
    "experts": ExpertsConfig,
    "balance": BalanceConfig,
    "optim": OptimConfig,
    "neck": NeckConfig,
}
NUMBERS = [0.0, -1.0, 1e-300, 1e-6, 0.999, 1e6, 1e39, 1e300, -1e300, math.inf, -math.inf, math.nan]
WHOLE = [0, -1, 1, 2**31, 2**63 - 1, 2**64]


def cases():
    for part, made in PARTS.items():
        for option in fields(made):
            kinds = str(option.type)
            if option.name == "target_load":
                yield part, option.name, [[value, 1.0, 1.0, 1.0] for value in NUMBERS]
            elif "float" in kinds:
                yield part, option.name, NUMBERS
            elif "int" in kinds and "list" not in kinds:
                yield part, option.name, WHOLE
    yield "router", "hidden", [[value] for value in (0, -1, 2**63 - 1, 2**64)]
    yield "router", "inputs", [[value] for value in (1, -1, 2**64)]
    yield "experts", "sizes", [[[4]] * 3 + [[value]] for value in (0, -1, 2**63 - 1, 2**64)]


def train(part, name, value):
    """Build the head with the option and train three steps. Return None, or the line with the reason for a refusal."""
    torch.manual_seed(0)
    kind = ROUTERS.readers().get(name, ["noisy_topk"])[-1]
    tokens = kind == "soft_moe"
    options = {part: {} for part in PARTS}
    options["router"] = {"kind": kind, "top_k": 1 if kind == "switch" else 2}
    options["experts"] = {"sizes": [[4], [5], [4], [5]]}
    options["neck"] = {"kind": "tokens"} if tokens else {}
    options[part][name] = value
    try:
        made = {part: config(**options[part]) for part, config in PARTS.items()}
        model = VisionMoE((3, 8) if tokens else (8,), 3, made["neck"], made["router"], made["experts"]).train()
        if name == "old_gate":
            hold_old_gates(model)
    except ValueError as error:
        return str(error)
    optimizer = build_optimizer(model, made["optim"])
    step = TrainingStep(model, optimizer, made["balance"], 0.1, made["optim"].clip_norm, "float32")
    for number in range(3):
        features = torch.randn(16, 3, 8) if tokens else torch.randn(16, 8)
        if step(features, torch.randint(3, (16,)), warmup=number == 0) is None:
            return "the {1} is not finite after {0} steps".format(*step.numbers.check())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    finite = bool(model.eval()(features)[0].isfinite().all())
    return None if finite else "the validation loss is not finite"


@pytest.mark.parametrize(("part", "name", "values"), cases(), ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_at_its_extremes_trains_or_is_rejected_in_one_line(part, name, values):
    for value in values:
        line = train(part, name, value)
        assert line is None or ("\n" not in line and (name in line or "is not finite" in line)), value
        if value != value or value in (math.inf, -math.inf, -1e300):
            assert line is not None, value
