"""Images and backbone are loaded at the same time; an error of either one is raised."""

import threading

import pytest
import torch

from assembly import pipeline
from common.errors import EnvironmentFault, UserError, as_environment_fault
from config.command_line import parse_command_line

CONFIG = parse_command_line(["--config", "configs/digits.yaml"]).config
CPU = torch.device("cpu")


def fails(message):
    def raises(*_):
        raise UserError(message)

    return raises


def test_images_are_loaded_while_the_backbone_is(monkeypatch):
    here = threading.Event()
    monkeypatch.setattr(pipeline, "read_images", lambda config: here.wait(60))
    monkeypatch.setattr(pipeline, "load_backbone", lambda *_: here.set() or torch.nn.Identity())
    monkeypatch.setattr(pipeline, "begin_fingerprint", lambda backbone: None)
    assert pipeline.load_both(CONFIG, CPU)[0] is True  # and not False, after a minute of waiting


def test_the_error_of_the_images_comes_first_even_if_it_is_later(monkeypatch):
    here = threading.Event()
    monkeypatch.setattr(pipeline, "read_images", lambda config: here.wait(60) and fails("no images")())
    monkeypatch.setattr(pipeline, "load_backbone", lambda *_: here.set() or fails("no weights")())
    with pytest.raises(UserError, match="no images"):
        pipeline.load_both(CONFIG, CPU)


def test_only_the_error_of_the_backbone_is_converted(monkeypatch):
    monkeypatch.setattr(pipeline, "load_backbone", fails("no weights"))
    monkeypatch.setattr(pipeline, "read_images", lambda config: None)
    with pytest.raises(EnvironmentFault, match="no weights"):
        pipeline.load_both(CONFIG, CPU, as_environment_fault)
    monkeypatch.setattr(pipeline, "read_images", fails("no images"))
    with pytest.raises(UserError, match="no images"):
        pipeline.load_both(CONFIG, CPU, as_environment_fault)
