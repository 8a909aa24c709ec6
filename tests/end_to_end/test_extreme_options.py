"""Every numeric option of data, augmentation, backbone, features and training at its extremes.

On 80 digits with the bundled ViT: the first epoch is trained and validated, or one line says what is wrong. The
options of the head are in tests/training/test_extremes.py.
"""

import re
from dataclasses import fields

import pytest
import torch

from assembly import pipeline
from assembly.pipeline import build_trainer, load_inputs
from common.errors import EnvironmentFault, exit_code
from config.command_line import parse_command_line
from config.config import Config
from model.backbone import load_backbone
from storage.folder import RunFolder
from tracking.tracker import open_tracker
from training.length import shorten_warmup
from training.trainer import Trainer

BASE = """--config configs/digits.yaml --data.max_per_class 8 --backbone.features [cls:0] --neck.kind pooled
--experts.sizes [[4],[8]] --train.batch_size 32 --features.cache_dir null --tracking none --device cpu
--augment.crop 1 --augment.scale 0.8 --augment.color_jitter 0.1"""
NUMBERS = ["0", "-1", "1e-300", "0.5", "1", "1e300", "-1e300", ".inf", "-.inf", ".nan"]
WHOLE = ["0", "-1", "1", "3", "1e14", str(2**63 - 1), str(2**64), ".inf", ".nan"]
BESIDE = {
    "backbone.image_size": ["--backbone.name", "test_vit", "--backbone.pretrained", "false"],
    "data.max_per_class": ["--data.max_classes", "2"],
}
NEVER = {".inf", "-.inf", ".nan", "-1e300"}

pytestmark = pytest.mark.slow


class Trained(Exception):
    """The first epoch is over."""


def cases():
    types = {item.name: item.type for item in fields(Config)}
    for section in ("data", "augment", "backbone", "features", "train"):
        for option in fields(types[section]):
            kind = str(option.type)
            if "float" in kind or "int" in kind:
                yield f"{section}.{option.name}", NUMBERS if "float" in kind else WHOLE
    yield "backbone.features", [f"[cls:{2**63}]", f"[cls:-{2**64}]", "[cls:1e3]"]


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Train the first epoch with one option at a value: None, or the line with the reason why that is impossible."""
    backbones = {}

    def cached(config, *arguments):
        key = repr(config)
        if key not in backbones:
            backbones[key] = load_backbone(config, *arguments)
        return backbones[key]

    def stop(trainer, values):
        raise Trained

    monkeypatch.setattr(pipeline, "load_backbone", cached)
    monkeypatch.setattr(Trainer, "_end_epoch", stop)
    folders = iter(range(100))

    def attempt(option, value):
        try:
            config = parse_command_line([*BASE.split(), *BESIDE.get(option, []), f"--{option}", value]).config
            inputs = load_inputs(config)
            config = shorten_warmup(config, len(inputs.splits.train))
            run = RunFolder.create(tmp_path / str(next(folders)), "test")
            with open_tracker("none", run.path, {}, name="test") as tracker:
                trainer = build_trainer(config, inputs)
                trainer.record_in(run, tracker)
                trainer.fit()
        except Trained:
            return None
        except Exception as error:
            assert exit_code(error) == 2 or isinstance(error, EnvironmentFault), (option, value, repr(error))
            return str(error)

    yield attempt
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("option", "values"), list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_number_at_its_extremes_trains_or_is_rejected_in_one_line(attempt, option, values):
    lines = {value: attempt(option, value) for value in values}
    for value, line in lines.items():
        assert line is None or ("\n" not in line and re.search(r"(data|augment|backbone|features|train)\.\w", line))
        assert line is not None or value not in NEVER, value
