"""Cloned studies: an agent repeats it with the values of its task."""

import pytest

from common.errors import EnvironmentFault, UserError
from config.command_line import parse_command_line
from tuning import clone
from tuning.clone import study_sections, study_words
from tuning.options import read_options
from tuning.space import Choice, Range, read_space
from tuning.study import StudyFolder
from tuning.worker import Plan

SPACE = {
    "optim.lr": Range(1e-4, 0.1, log=True, whole=False),
    "router.top_k": Range(1, 2, log=False, whole=True),
    "router.kind": Choice(("noisy_topk", "switch")),
    "experts.sizes": Choice(([[16], [32]], ["small", "large"])),
    "router.inputs": Choice((None, [0])),
}


@pytest.fixture
def task(monkeypatch, tmp_path):
    """Give the agent the task of a study, with some values of its section study changed."""
    monkeypatch.setenv("CLEARML_TASK_ID", "0" * 32)
    config = parse_command_line(["--config", "configs/digits.yaml", "--train.epochs", "3"]).config.to_dict()

    def task(**study):
        plan = Plan(StudyFolder(tmp_path / "my study"), SPACE, [], trials=7, prune=False)
        sections = {name: value for name, value in config.items() if isinstance(value, dict)}
        sections |= study_sections(plan, 2, None) | {"General": {"run_dir": None, "tracking": "auto"}}
        sections["study"] |= study
        texts = {
            section: {name: "" if value is None else str(value) for name, value in values.items()}
            for section, values in sections.items()
        }
        monkeypatch.setattr(clone, "task_sections", lambda task_id: texts)

    return task


def test_the_command_of_a_clone_is_that_of_the_study(task, tmp_path):
    task(jobs=3)
    options, words = read_options("", study_words([]))
    assert (options.trials, options.jobs, options.queue, options.no_pruning) == (7, 3, None, True)
    assert options.out == tmp_path / "my study" and read_space(options.space) == SPACE
    config = parse_command_line(words).config
    assert (config.data.name, config.train.epochs, config.tracking) == ("digits", 3, "auto")


def test_the_folder_of_a_clone_may_start_with_the_home_folder(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task(out="~/again")
    options, _ = read_options("", study_words([]))
    assert options.out == tmp_path / "again" and options.space.parent == options.out


def test_a_clone_overwrites_no_file_of_the_folder(task, tmp_path):
    folder = tmp_path / "my study"
    folder.mkdir()
    for name in ("space.yaml", "study.yaml"):
        (folder / name).write_text("mine", encoding="utf-8")
    task()
    study_words([])
    assert [(folder / name).read_text(encoding="utf-8") for name in ("space.yaml", "study.yaml")] == ["mine", "mine"]


def test_a_command_line_is_used_as_it_is(task):
    task()
    assert study_words(["--trials", "3"]) == ["--trials", "3"]


def test_a_task_without_a_study_and_a_folder_that_cannot_be_created(task, tmp_path):
    task(out="")
    with pytest.raises(UserError, match="names no folder for the study: set study/out"):
        study_words([])
    (tmp_path / "file").touch()
    task(out=tmp_path / "file" / "study")
    with pytest.raises(EnvironmentFault, match=r"out in ClearML task 0+: .* cannot be created"):
        study_words([])
