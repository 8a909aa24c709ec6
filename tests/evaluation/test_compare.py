"""evaluate.py --compare, and the errors of evaluate.py for unusable runs."""

import json
import sys
import types

import pytest
import torch
import yaml
from PIL import Image

import evaluate
from common.errors import EnvironmentFault, UserError, exit_code_of
from config.config import Config
from evaluation.compare import Compared, differences, load

TASK = "0123456789abcdef0123456789abcdef"
METRICS = {"macro_f1": 0.5, "accuracy": 0.6, "entropy": 0.9, "cv": 0.1, "specialisation": {"normalised": 0.2}}


def write_run(path, metrics=METRICS, **config):
    (path / "evaluation").mkdir(parents=True)
    (path / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    values = {"run_dir": str(path), "train": {"epochs": 3, "seed": 0}, "router": {"kind": "noisy_topk"}} | config
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """evaluate.py with these arguments, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        return exit_code_of(evaluate.main), *capsys.readouterr()

    return run


@pytest.fixture
def server(monkeypatch):
    """A replacement for ClearML: a dict of task id -> what fetch_run returns or raises."""
    tasks = {}

    def fetch_run(task_id):
        if isinstance(tasks[task_id], Exception):
            raise tasks[task_id]
        return tasks[task_id]

    module = types.ModuleType("tracking.clearml_runs")
    module.fetch_run = fetch_run
    monkeypatch.setitem(sys.modules, "tracking.clearml_runs", module)
    return tasks


def cells(text, first):
    """The cells of the line of the printed table with this start."""
    line = next(line for line in text.splitlines() if line.startswith(first))
    return line.removeprefix(first).split()


def test_two_runs_side_by_side(call, tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(
        tmp_path / "b", {**METRICS, "macro_f1": 0.75}, train={"epochs": 9, "seed": 0}, neck={"kind": "flatten"}
    )
    code, out, _ = call("--compare", a, b)
    assert code == 0
    assert cells(out, "macro-F1") == ["50.00", "%", "75.00", "%"]
    assert cells(out, "balance") == ["0.900", "0.900"]
    assert cells(out, "train.epochs") == ["3", "9"]
    assert cells(out, "neck.kind") == ["–", "flatten"]
    assert "train.seed" not in out and "run_dir" not in out and "test images" not in out
    written = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert written["differing"] == ["train.epochs", "neck.kind"]
    assert written["runs"][1]["figures"]["macro_f1"] == 0.75
    assert written["runs"][1]["config"]["train.epochs"] == 9
    markdown = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "| train.epochs | 3 | 9 |" in markdown and "![" in markdown
    with Image.open(tmp_path / "comparison" / "comparison.png") as image:
        image.verify()


def test_cost_load_and_state_are_shown_with_the_scores(call, tmp_path):
    cost = {"trained_parameters": 937748, "flops": 4.87e8, "training_seconds": 67.0, "kept_epoch": 2, "epochs": 2}
    a = write_run(tmp_path / "a", METRICS | {"cost": cost, "expert_load": [0.26, 0.74]})
    b = write_run(tmp_path / "b")
    lines = [{"epoch": t, "step": t, "macro_f1/validation": 0.1 * t} for t in (1, 2)]
    (a / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, _ = call("--compare", a, b)
    assert code == 0
    assert cells(out, "state") == ["unfinished:", "2", "of", "3", "epochs", "finished"]
    assert cells(out, "parameters, trained") == ["938", "k", "–"]
    assert cells(out, "training time") == ["1", "min", "7", "s", "–"]
    assert cells(out, "load of each expert") == ["26", "74", "%", "–"]
    written = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert written["runs"][0]["state"] == "unfinished: 2 of 3 epochs" and written["runs"][1]["load_E"] == []
    assert "Peak memory: of the GPU" in (tmp_path / "comparison" / "comparison.md").read_text(encoding="utf-8")


def test_a_single_expert_has_no_balance_and_no_specialisation(call, tmp_path):
    a = write_run(tmp_path / "a", METRICS | {"expert_load": [0.5, 0.5]})
    b = write_run(tmp_path / "b", METRICS | {"expert_load": [1.0]})
    _, out, _ = call("--compare", a, b)
    for name, value in (("balance", "0.900"), ("CV of the load", "0.100"), ("specialisation", "0.200")):
        assert cells(out, name) == [value, "–"]
    assert cells(out, "accuracy") == ["60.00", "%", "60.00", "%"]


def test_unscored_runs_are_compared_with_scored_ones(call, tmp_path):
    runs = [write_run(tmp_path / name) for name in "abc"]
    for run, epochs in zip(runs[1:], (2, 3), strict=True):
        (run / "evaluation" / "metrics.json").unlink()
        lines = [{"epoch": t, "step": t} for t in range(1, epochs + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, _ = call("--compare", *runs)
    assert code == 0
    state = next(line for line in out.splitlines() if line.startswith("state"))
    assert "finished  unfinished: 2 of 3 epochs  not scored: python evaluate.py" in state
    assert cells(out, "macro-F1") == ["50.00", "%", "–", "–"]


def test_many_runs_have_one_row_each_and_unique_names(call, tmp_path):
    runs = [write_run(tmp_path / str(i % 2) / f"run {i // 2}", train={"epochs": 3, "seed": i}) for i in range(8)]
    code, _, err = call("--compare", *runs, "--out", "/proc/out")
    assert code == 1 and "--out /proc/out/comparison.json cannot be created in /proc" in err
    code, out, _ = call("--compare", *runs, "--out", tmp_path / "new" / "out")
    assert code == 0
    header, *lines = out.splitlines()
    assert header.split()[-1] == "train.seed" and "macro-F1" in header
    assert [line.split()[-1] for line in lines[:8]] == list("01234567")
    assert [line.startswith(str(run)) for line, run in zip(lines, runs, strict=False)] == [True] * 8
    assert (tmp_path / "new" / "out" / "comparison.png").is_file() and not (tmp_path / "comparison").exists()


def test_names_with_markdown_characters_are_escaped(call, tmp_path):
    a, b = write_run(tmp_path / "a|b_<i>"), write_run(tmp_path / "`c`")
    assert call("--compare", a, b)[0] == 0
    markdown = (tmp_path / "comparison" / "comparison.md").read_text()
    assert r"|  | a\|b\_\<i\> | \`c\` |" in markdown


def test_a_clearml_task_is_compared_with_a_run(call, tmp_path, server):
    a = write_run(tmp_path / "a")
    server[TASK] = {"name": "task", "config": {"train": {"epochs": "3", "seed": 7}}, "metrics": {"macro_f1": 0.25}}
    code, out, _ = call("--compare", a, TASK)
    assert code == 0
    assert cells(out, "macro-F1") == ["50.00", "%", "25.00", "%"]
    assert cells(out, "accuracy") == ["60.00", "%", "–"]
    assert cells(out, "train.seed") == ["0", "7"]
    assert "train.epochs" not in out  # a server returns text
    server[TASK]["state"] = "unfinished: the task is in progress"
    code, out, _ = call("--compare", a, TASK)
    assert (code, cells(out, "state")) == (0, ["finished", "unfinished:", "the", "task", "is", "in", "progress"])


def test_a_rejection_by_the_server_is_reported_in_one_line(call, tmp_path, server):
    server[TASK] = EnvironmentFault(f"task {TASK} cannot be read: the server does not answer")
    code, _, err = call("--compare", write_run(tmp_path / "a"), TASK)
    assert (code, err.count("\n")) == (1, 1)
    assert "does not answer" in err


def test_a_run_without_a_score_and_one_with_infinite_loss(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.py .* first"):
        load(str(tmp_path))
    run = load(str(write_run(tmp_path / "a", {"loss": float("inf"), "accuracy": 0.1, "gate": {"entropy_mean": None}})))
    assert run.figures == {"accuracy": 0.1}


def test_differences_cover_only_the_configuration():
    runs = [
        Compared("a", "a", {"device": "cpu", "data.root": "/x", "x": [1, 2], "y": None}, {}),
        Compared("b", "b", {"device": "cuda", "data.root": "/y", "x": [1, 3], "y": None, "z": 1}, {}),
    ]
    assert differences(runs) == ["x", "z"]


@pytest.mark.parametrize("blocked", ["comparison.json", "comparison.png"])
def test_a_file_that_cannot_be_written_is_reported_in_one_line(call, tmp_path, blocked):
    (tmp_path / "out" / blocked).mkdir(parents=True)
    code, _, err = call("--compare", write_run(tmp_path / "a"), write_run(tmp_path / "b"), "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert blocked in err and "could not be written" in err


def truncated(tmp_path):
    run = write_run(tmp_path / "truncated")
    (run / "evaluation" / "metrics.json").write_text('{"accuracy": 0.')
    return run


def listed(tmp_path):
    return write_run(tmp_path / "listed", metrics=[1, 2])


def nameless(tmp_path):
    run = write_run(tmp_path / "nameless")
    (run / "config.yaml").unlink()
    return run


@pytest.mark.parametrize(
    "bad, words",
    [
        (truncated, "corrupt config.yaml or evaluation/metrics.json"),
        (listed, "another version"),
        (nameless, "has no config.yaml"),
        (lambda path: path / "none", "neither the folder of a run nor the id of a ClearML task"),
        (lambda path: TASK[:-1], "neither the folder of a run nor the id"),
    ],
)
def test_sources_that_cannot_be_compared_are_reported_in_one_line(call, tmp_path, bad, words):
    code, _, err = call("--compare", write_run(tmp_path / "good"), bad(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("words", [["--latency"], ["--data.root", "x"], ["--worth_images", "8"]])
def test_options_of_a_single_run_are_rejected_with_compare(call, tmp_path, words):
    code, _, err = call(*words, "--compare", write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{words[0]} is for evaluating a RUN, not for --compare" in err


def test_the_command_line_is_explained_in_one_screen(call):
    code, out, _ = call("--help")
    assert code == 0 and 9 < out.count("\n") <= 40
    for arguments, words in (
        (["--compare", "a"], "two runs or more"),
        (["a", "--compare", "b", "c"], "name one RUN"),
        (["a", "--out", "b"], "--out needs --compare"),
        (["a", "b", "c"], "or compare several: --compare a b c"),
        (["a", "--device", "cpu", "b"], "or compare several: --compare a b"),
        (["a", "--colour", "red"], "unrecognized arguments: --colour red"),
    ):
        code, _, err = call(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err


def describe(path, **changes):
    """A folder with a model.json with the defaults on digits, except for these changes."""
    config = Config().to_dict()
    config["data"]["name"] = "digits"
    for key, value in changes.pop("config", {}).items():
        section, _, name = key.partition(".")
        config[section][name] = value
    described = {"format_version": 1, "epoch": 1, "config": config, "backbone": {"name": "x", "fingerprint": "0" * 64}}
    described["data"] = dict.fromkeys(("train", "validation", "test"), "0" * 64)
    described |= {"class_names": [str(digit) for digit in range(10)], "feature_shape": [48], **changes}
    (path / "model.json").write_text(json.dumps(described))


def only_a_configuration(path):
    write_run(path / "x").joinpath("config.yaml").rename(path / "config.yaml")


def truncated_checkpoint(path):
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "best.pt").write_bytes(b"truncated")


def checkpoint_of_another_version(path):
    (path / "checkpoints").mkdir()
    torch.save({"format_version": 0}, path / "checkpoints" / "best.pt")


@pytest.mark.parametrize(
    "prepare, words",
    [
        (only_a_configuration, "has no checkpoint yet"),
        (truncated_checkpoint, "truncated or not a checkpoint"),
        (checkpoint_of_another_version, "checkpoint format 0, this version reads 1"),
        (lambda path: describe(path, format_version=0), "not of format 1"),
        (lambda path: describe(path, config={"train.colour": "red"}), "train.colour"),
        (lambda path: describe(path, config={"backbone.weights": "/none.safetensors"}), "/none.safetensors"),
        (lambda path: describe(path, config={"backbone.name": "bundled/vit_micro"}), "fingerprint"),
        (lambda path: (path / "model.json").write_text("{"), "not readable JSON"),
    ],
)
def test_a_run_that_cannot_be_scored_is_reported_in_one_line(call, tmp_path, prepare, words):
    prepare(tmp_path)
    code, _, err = call(tmp_path)
    assert (code, err.count("\n")) == (1, 1), err
    assert words in err
    assert not (tmp_path / "evaluation").exists()
