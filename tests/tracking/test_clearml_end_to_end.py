"""train.py and evaluate.py from the user's view with a ClearML server, from the command line to the server's data."""

import copy
import json
import uuid

import pytest
from clearml_process import run_forked
from clearml_standin import StandIn
from conftest import PNG, ROOT, TINY

pytestmark = pytest.mark.slow  # each test is a process that imports the SDK

CODE = f"""
import runpy
from matplotlib.figure import Figure
Figure.savefig = lambda figure, path, **options: Path(path).write_bytes({PNG!r})  # drawing is slow
os.chdir({str(ROOT)!r})
def run_program(*words):
    sys.argv = [str(word) for word in words]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
options = ("--data.max_per_class", 20, "--train.epochs", 3, "--tracking", "clearml", "--run_dir", run / "tiny")
run_program("train.py", *{TINY.split()!r}, *options)
run_program("evaluate.py", run / "tiny")
task_id = json.loads((run / "tiny" / "clearml.json").read_text())[0]["task_id"]
run_program("evaluate.py", "--compare", run / "tiny", task_id, "--out", run / "comparison")
more = ("--train.epochs", 1, "--tracking", "clearml", "--run_dir", run / "more")
run_program("train.py", "--init", run / "tiny", "--experts.add", "[[8]]", *more)
"""


AGENT = f"""
import runpy
import evaluation.figures
evaluation.figures.draw = lambda *_: []
os.chdir({str(ROOT)!r})
sys.argv = ["train.py"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def tracked(workplace, tmp_path_factory):
    """The server, the run folder and the output."""
    folder = tmp_path_factory.mktemp("tracked")
    with StandIn() as server:
        output = run_forked(workplace, folder, CODE, **server.environment())
        yield server, folder / "tiny", output


def test_training_and_evaluation_leave_two_linked_tasks(tracked):
    server, run, output = tracked
    training, evaluation, _ = server.tasks.values()
    assert (training["type"], training["status"]) == ("training", "completed")
    assert (evaluation["type"], evaluation["status"]) == ("testing", "completed")
    assert evaluation["parent"] == training["id"]
    assert json.loads((run / "clearml.json").read_text())[0]["task_id"] == training["id"]
    for task in (training, evaluation):
        assert set(task["tags"]) == {"digits", "bundled/vit_micro", "noisy_topk"}
        assert task["name"] == "tiny" and task["hyperparams"]["router"]["top_k"]["value"] == "2"
    assert training["script"]["entry_point"] == "train.py"
    assert training["id"] in output  # in the address of the task's page


def test_the_task_has_every_number_and_the_evaluation_as_data(tracked):
    server, run, _ = tracked
    training, evaluation, _ = server.tasks.values()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "evaluation" / "metrics.json").read_text())
    scalars = server.scalars(training["id"])
    for line in lines[1:]:  # the first epoch is the warm-up's, which has no load
        for key in ("loss/train", "loss/validation", "macro_f1/validation", "expert_load/expert_0", "balance/entropy"):
            title, series = key.split("/")
            assert scalars[title, series, line["step"]] == pytest.approx(line[key])
    for task in (training["id"], evaluation["id"]):
        for name in ("accuracy", "macro_f1", "loss", "entropy"):
            assert server.scalars(task)["Summary", f"test/{name}", -(2**31)] == pytest.approx(results[name])
        for name in ("total_parameters", "active_parameters", "flops", "training_seconds", "kept_epoch"):
            found = server.scalars(task)["Summary", f"cost/{name}", -(2**31)]
            assert found == pytest.approx(results["cost"][name])
        for expert, load in enumerate(results["expert_load"]):
            assert server.scalars(task)["Summary", f"load/expert_{expert}", -(2**31)] == pytest.approx(load)
        plots = {event["metric"]: event for event in server.events if event["type"] == "plot" and event["task"] == task}
        assert {"expert load", "experts by class", "F1 by class", "scores by class", "experts"} <= plots.keys()
        shown = {event["variant"] for event in server.events if event["type"] == "training_debug_image"}
        assert {"expert_by_class", "samples", "training_curves"} <= shown
    stored = {artifact["key"] for artifact in training["execution"]["artifacts"]}
    assert {"evaluation", "figure expert_by_class", "figure training_curves"} <= stored
    model = next(iter(server.models.values()))
    assert model["uri"].endswith("model.safetensors") and model["task"] == training["id"]


def test_a_run_that_starts_from_another_is_linked_to_its_task_and_its_model(tracked):
    server, run, _ = tracked
    training, _, more = server.tasks.values()
    first, second = server.models.values()
    assert (more["parent"], more["type"], more["status"]) == (training["id"], "training", "completed")
    assert [entry["model"] for entry in more["models"]["input"]] == [first["id"]] and second["task"] == more["id"]
    assert more["hyperparams"]["General"]["init"]["value"] == str(run)
    assert more["hyperparams"]["experts"]["grown"]["value"] == "[4]"
    results = json.loads((run.parent / "more" / "evaluation" / "metrics.json").read_text())
    assert results["init"]["task_id"] == training["id"]
    assert f"Starts from {run}" in (run.parent / "more" / "evaluation" / "report.html").read_text()


def test_a_task_compares_with_a_folder_as_equal_to_itself(tracked):
    """The folder and the task of one run: the same scores, and no difference of configuration."""
    _, run, _ = tracked
    compared = json.loads((run.parent / "comparison" / "comparison.json").read_text())
    assert compared["differing"] == []
    folder, task = compared["runs"]
    assert task["figures"] == pytest.approx(folder["figures"]) and "macro_f1" in task["figures"]
    assert task["config"] == folder["config"]


@pytest.mark.slow
def test_an_agent_runs_a_clone_with_the_values_of_its_task(tracked, workplace):
    """Without --config, which the script of a task does not have; the clone has one more epoch and another folder."""
    server, run, _ = tracked
    training = next(iter(server.tasks.values()))
    clone = copy.deepcopy(training) | {"id": uuid.uuid4().hex, "name": "clone", "status": "in_progress"}
    clone["hyperparams"]["train"]["epochs"]["value"] = "2.0"
    clone["hyperparams"]["General"]["run_dir"]["value"] = str(run.parent / "clone")
    server.tasks[clone["id"]] = clone
    run_forked(workplace, run, AGENT, CLEARML_TASK_ID=clone["id"], CLEARML_PROC_MASTER_ID="", **server.environment())
    lines = [json.loads(line) for line in (run.parent / "clone" / "metrics.jsonl").read_text().splitlines()]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert len(lines) == 2 and lines[0]["loss/train"] == pytest.approx(first["loss/train"], rel=0.2)
    assert ("loss", "train", lines[-1]["step"]) in server.scalars(clone["id"])
