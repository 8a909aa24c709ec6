"""A task executed by an agent: its values override the others, and are checked like those of the command line."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from config.command_line import parse_command_line
from config.config import write_config
from evaluation.options import read_options
from tracking import agent
from tracking.agent import apply_agent_values, evaluation_words
from tracking.clearml_runs import _config

TASK = "0" * 32


@pytest.fixture
def clone(monkeypatch):
    """Set up the environment of an agent whose task has these texts for the options of configs/digits.yaml."""
    monkeypatch.setenv("CLEARML_TASK_ID", TASK)

    def clone(**texts):
        sections = {}
        for key, value in parse_command_line(["--config", "configs/digits.yaml"]).config.to_dict().items():
            inside = value if isinstance(value, dict) else {key: value}
            section = sections.setdefault(key if isinstance(value, dict) else "General", {})
            section |= {name: SimpleNamespace(value="" if v is None else str(v)) for name, v in inside.items()}
        for key, text in texts.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section or "General", {})[name] = SimpleNamespace(value=text)
        sections["Environment"] = {"HOME": SimpleNamespace(value="/root")}  # others may keep what they like
        monkeypatch.setattr(
            agent, "get_task", lambda task_id: SimpleNamespace(data=SimpleNamespace(hyperparams=sections))
        )

    return clone


@pytest.mark.parametrize(
    "words", [[], ["--config", "configs/article.yaml", "--train.epochs", "5", "--run_dir", "mine"]]
)
def test_the_values_of_the_task_override_the_command_line(clone, words, tmp_path):
    clone(**{"train.epochs": "2.0", "experts.dropout": "[0.1, 0.1, 0.1, 0.2]", "run_dir": str(tmp_path / "run2")})
    invocation = apply_agent_values(parse_command_line(words))
    config = invocation.config
    assert (config.data.name, config.backbone.name, config.neck.kind) == ("digits", "bundled/vit_micro", "flatten")
    assert (config.train.epochs, config.experts.dropout) == (2, [0.1, 0.1, 0.1, 0.2])
    assert config.run_dir == tmp_path / "run2"
    assert invocation.name == "digits"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("train.epochs", "many", f"train.epochs in ClearML task {TASK} is 'many': give a whole number"),
        ("train.epochs", "2.5", f"train.epochs in ClearML task {TASK} is '2.5': give a whole number"),
        ("train.epochs", "", f"train.epochs in ClearML task {TASK} is '': give a whole number"),
        ("optim.lr", "fast", f"optim.lr in ClearML task {TASK} is 'fast': give a number"),
        ("train.keep", "lastt", "is 'lastt': give one of best, last; did you mean last?"),
        ("experts.sizes", "[[8], tiny]", "give a list in brackets of any of small, medium"),
        ("train.epochz", "3", f"unknown option train.epochz in ClearML task {TASK}: did you mean train.epochs?"),
        ("router.top_k", "9", "router.top_k is 9 but experts.sizes names 4"),
    ],
)
def test_an_invalid_value_is_reported_with_the_task(clone, name, text, words):
    clone(**{name: text})
    with pytest.raises(UserError) as caught:
        apply_agent_values(parse_command_line([]))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_resumed_run_stays_in_its_folder(clone, tmp_path):
    clone(**{"train.epochs": "20", "run_dir": "elsewhere"})
    write_config(parse_command_line(["--config", "configs/digits.yaml"]).config, tmp_path / "config.yaml")
    invocation = apply_agent_values(parse_command_line(["--resume", str(tmp_path)]))
    assert invocation.resume == invocation.config.run_dir == tmp_path
    assert invocation.config.train.epochs == 20


@pytest.mark.parametrize("mode", ["none", "offline"])
def test_without_an_agent_no_server_is_contacted(clone, monkeypatch, mode):
    clone(**{"train.epochs": "many"})
    invocation = parse_command_line(["--tracking", mode])
    assert apply_agent_values(invocation) is invocation
    monkeypatch.delenv("CLEARML_TASK_ID")
    invocation = parse_command_line([])
    assert apply_agent_values(invocation) is invocation


def test_a_task_that_cannot_be_read_ends_the_run(clone, monkeypatch):
    def fail(task_id):
        raise UserError("no ClearML server is configured")

    clone()
    monkeypatch.setattr(agent, "get_task", fail)
    with pytest.raises(UserError, match=f"the values of ClearML task {TASK}.* no ClearML server is conf") as caught:
        apply_agent_values(parse_command_line([]))
    assert caught.value.exit_code == 1


def test_a_cloned_evaluation_is_that_of_the_run_in_its_values(clone, tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    write_config(parse_command_line(["--config", "configs/digits.yaml"]).config, run / "config.yaml")
    clone(run_dir=str(run), **{"data.root": "/images", "device": "cpu", "features.cache_dir": ""})
    options = read_options("", evaluation_words([]))
    assert (options.run, options.tracking, options.device) == (run, "clearml", "cpu")
    assert (options.root, options.weights, options.cache_dir) == (Path("/images"), None, None)
    assert evaluation_words(["--compare", "a", "b"]) == ["--compare", "a", "b"]
    for texts, said in (
        ({"run_dir": str(run), "router.top_k": "1"}, "is 1, but the run has 2: an evaluation cannot change it"),
        ({"run_dir": ""}, f"ClearML task {TASK} names no run to evaluate: set its run_dir"),
        ({"run_dir": str(tmp_path / "none")}, "is not a run folder"),
    ):
        clone(**texts)
        with pytest.raises(UserError, match=said):
            evaluation_words([])


def test_values_in_a_comparison_have_the_types_of_the_options():
    edited = {
        "train": {"epochs": "2.0", "deterministic": "true", "lr": "1e-05"},
        "router": {"noise_std": "", "top_k": "many"},
    }
    sections = {s: {n: SimpleNamespace(value=v, type=None) for n, v in values.items()} for s, values in edited.items()}
    sections["General"] = {
        "run_dir": SimpleNamespace(value="runs/a", type="str"),
        "note": SimpleNamespace(value="", type=None),
    }
    assert _config(sections) == {
        "train": {"epochs": 2, "deterministic": True, "lr": 1e-05},
        "router": {"noise_std": None, "top_k": "many"},
        "run_dir": "runs/a",
        "note": None,
    }
