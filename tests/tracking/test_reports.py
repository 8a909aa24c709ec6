"""The calls to ClearML for plots, on a stand-in for its task."""

import io
import json
import math
import queue
from types import SimpleNamespace

import pytest

from tracking.tasks import record_task, tasks_of
from tracking.tracker import Tracker, open_evaluation


class Logger:
    """Records its calls as (report, positional arguments, named arguments)."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, report):
        return lambda *args, **kwargs: self.calls.append((report, args, kwargs))


@pytest.fixture
def tracker():
    """A tracker whose task records its calls: `tracker.asked()`."""
    lines, jobs, logger = io.StringIO(), queue.SimpleQueue(), Logger()
    lines.name = "metrics.jsonl"
    clearml = SimpleNamespace(mode="offline", task=SimpleNamespace(id="1", get_logger=lambda: logger), jobs=jobs)
    made = Tracker(lines, clearml)

    def asked():
        while not jobs.empty():
            job, args = jobs.get()
            job(clearml.task, *args)
        return logger.calls

    made.asked = asked
    return made


def test_numbers_are_logged_under_their_title_without_non_finite_values(tracker):
    values = {"loss/train": 0.5, "expert_load/blocks/3": 0.25, "seconds": 2, "loss/validation": math.nan, "a/b": None}
    tracker.scalars(values, step=7, epoch=2)
    assert tracker.asked() == [
        ("report_scalar", ("loss", "train", 0.5, 7), {}),
        ("report_scalar", ("expert_load", "blocks/3", 0.25, 7), {}),
        ("report_scalar", ("seconds", "seconds", 2.0, 7), {}),
    ]
    record = json.loads(tracker._lines.getvalue())
    assert record == {**values, "step": 7, "epoch": 2, "loss/validation": None}


def test_only_numbers_with_a_title_are_sent_again(tracker):
    tracker._resend([{"step": 3, "epoch": 1, "loss/train": 0.5, "loss/validation": None}, {"x/y": 1.0}])
    assert [call[1] for call in tracker.asked()] == [("loss", "train", 0.5, 3), ("x", "y", 1.0, 0)]


def test_a_matrix_has_its_first_row_on_top_and_its_columns_along_x(tracker):
    tracker.matrix("confusion", "test", [[1, None], [math.inf, 4]], ("true", ["a", "b"]), ("said", ["c", "d"]))
    ((report, args, named),) = tracker.asked()
    assert report == "report_confusion_matrix"
    assert args == ("confusion", "test", [[1.0, None], [None, 4.0]], 0)
    labels = {"xlabels": ["c", "d"], "ylabels": ["a", "b"]}
    assert named == {"xaxis": "said", "yaxis": "true", **labels, "yaxis_reversed": True}


def test_curves_and_bars_leave_out_non_finite_values(tracker):
    tracker.lines("curve", {"a": [(0, 1), (1, math.nan), (2, 3)], "none": [(0, math.inf)]}, ("x", "y"))
    tracker.bars("load", "test", ["e0", "e1"], {"share": [0.5, None], "due": [math.nan, 0.5]})
    tracker.table("t", "s", ["name", "value"], [["a", math.nan], ["b", 1.5], ["c", None]])
    tracker.summary({"accuracy": 0.5, "gain": math.nan})
    scatter, histogram, table, single = tracker.asked()
    assert scatter[1] == ("curve", "a", [(0, 1), (2, 3)], 0)
    assert (scatter[2]["xaxis"], scatter[2]["yaxis"]) == ("x", "y")
    assert histogram[1][2] == [[0.5, None], [None, 0.5]]
    assert (histogram[2]["labels"], histogram[2]["xlabels"]) == (["share", "due"], ["e0", "e1"])
    assert table[2]["table_plot"] == [["name", "value"], ["a", ""], ["b", 1.5], ["c", None]]
    assert single == ("report_single_value", ("accuracy", 0.5), {})


def test_the_tasks_of_a_run_are_listed_oldest_first_without_duplicates(tmp_path):
    def remember(task_id, whole):
        task = SimpleNamespace(mode="clearml", task=SimpleNamespace(id=task_id), place=lambda: {"page": "p"})
        record_task(tmp_path, task, whole)

    for task_id in ("1", "2", "3"):
        remember(task_id, whole=False)
    remember("3", whole=True)
    assert [(task["task_id"], task["whole"]) for task in tasks_of(tmp_path)] == [
        ("1", False),
        ("2", False),
        ("3", True),
    ]


def test_an_evaluation_belongs_to_the_last_task_on_a_server(tmp_path, monkeypatch):
    tasks = [("clearml", "1"), ("clearml", "2"), ("offline", "3")]
    listed = [{"mode": mode, "task_id": task_id, "whole": True} for mode, task_id in tasks]
    (tmp_path / "clearml.json").write_text(json.dumps(listed), encoding="utf-8")
    asked = []
    monkeypatch.setattr("tracking.tracker.ClearMLTask", lambda *task: asked.append(task) or made)
    made = SimpleNamespace(mode="clearml", task=SimpleNamespace(id="9"), jobs=queue.SimpleQueue())
    tracker = open_evaluation("auto", tmp_path, {}, name="test")
    ((mode, *_, kind, parent),) = asked
    assert (mode, kind, parent) == ("clearml", "testing", "2")
    assert not tracker.resends  # the last one has everything
    listed[1]["whole"] = False
    (tmp_path / "clearml.json").write_text(json.dumps(listed), encoding="utf-8")
    assert open_evaluation("auto", tmp_path, {}, name="test").resends
