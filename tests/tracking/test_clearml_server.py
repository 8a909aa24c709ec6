"""The real SDK with a working server: what a run stores there, what continues it, and what is read back."""

import json

import pytest
from clearml_process import CLOSE, CONFIG, OPEN, facts_of, run_python
from clearml_standin import StandIn
from conftest import PNG

pytestmark = pytest.mark.slow  # each test is a process that imports the SDK


@pytest.fixture(scope="module")
def online(workplace):
    """A run that reports everything, resumes twice and is evaluated again: (the server, facts, its output)."""
    run = workplace / "online"
    run.mkdir()
    (run / "figure.png").write_bytes(PNG)
    (run / "model.safetensors").write_bytes(b"weights")
    (run / "metrics.json").write_text('{"accuracy": 0.75, "expert_load": [0.25, 0.75]}')
    code = """
from tracking.clearml_runs import fetch_run
def refused(task_id):
    try:
        fetch_run(task_id)
    except UserError as error:
        return [type(error).__name__, str(error)]
tracker = start()
tracker.scalars({"loss/train": 0.5, "loss/validation": float("nan")}, step=10, epoch=1)
tracker.scalars({"loss/train": 0.25}, step=20, epoch=2)
tracker.summary({"test/accuracy": 0.75, "test/macro_f1": 0.5})
tracker.table("scores", "test", ["class", "f1"], [["apple", 0.5]])
tracker.bars("expert load", "test", ["0", "1"], {"load": [0.25, 0.75], "weight": [0.5, float("nan")]})
classes, experts = ("class", ["apple", "bear"]), ("expert", ["0", "1"])
tracker.matrix("experts by class", "test", [[0.125, 0.875], [1, 0]], classes, experts)
tracker.lines("reliability", {"test": [(0.0, 0.0), (0.5, float("nan")), (1.0, 0.75)]}, ("confidence", "accuracy"))
tracker.figure("evaluation", "samples", run / "figure.png")
tracker.artifact("evaluation", run / "metrics.json")
tracker.model(run / "model.safetensors", "cifar100", ["apple", "bear"])
tracker.close()
facts["first"], facts["listed"] = tracker.task_id, tasks_of(run)
again = start(task_id=tracker.task_id, resume_step=10)
again.scalars({"loss/train": 0.125}, step=20, epoch=2)
again.close()
facts["again"], facts["still listed"] = again.task_id, tasks_of(run)
evaluation = open_evaluation("auto", run, CONFIG, name="cifar100", tags=["cifar100"])
assert not evaluation.resends
evaluation.summary({"test/accuracy": 0.625, "test/specialisation": 0.5})
evaluation.close()
facts["evaluation"] = evaluation.task_id
lost = start(task_id="0" * 32, resume_step=20)
lost.close(failed="out of memory")
facts["lost"] = lost.task_id
facts["fetched"] = fetch_run(tracker.task_id)
facts["fetched single"] = fetch_run(evaluation.task_id)
print("asking", file=sys.stderr)
facts["unknown"] = refused("f" * 32)
print("asked", file=sys.stderr)
session = open_tracker("offline", run / "offline", CONFIG, name="train", tags=["digits"])
session.scalars({"loss/train": 0.5}, step=10)
session.summary({"test/accuracy": 0.5})
session.model(run / "model.safetensors", "offline model", ["apple", "bear"])
session.close(failed="out of memory")
(listed,) = tasks_of(run / "offline")
from tracking.send import send
facts["imported"] = send(Path(listed["session"]))
later = start()
later.starts_from(facts["first"])
later.close()
facts["later"] = later.task_id
from clearml import Dataset
from tracking.datasets import fetch_dataset
(run / "images" / "cat").mkdir(parents=True)
(run / "images" / "cat" / "0.png").write_bytes((run / "figure.png").read_bytes())
made = Dataset.create(dataset_name="cats", dataset_project="pets", dataset_version="1.0.0")
made.add_files(str(run / "images"), verbose=False)
made.upload(show_progress=False)
made.finalize()
copies = [fetch_dataset(name) for name in ("pets/cats", made.id)]
facts["dataset"] = [[path.relative_to(copy).as_posix() for path in copy.rglob("*.png")] for copy in copies]
print("asking for a dataset", file=sys.stderr)
try:
    fetch_dataset("pets/dogs")
except UserError as error:
    facts["no dataset"] = str(error)
print("asked", file=sys.stderr)
"""
    with StandIn() as server:
        done = run_python(workplace, run, OPEN + code + CLOSE, **server.environment())
        # The SDK itself logs the upload of a dataset with a level that its schema does not have.
        server.misfits[:] = [misfit for misfit in server.misfits if "level: 'INFO' is not one of" not in misfit]
        yield server, facts_of(run), done


def test_the_task_contains_hyperparameters_tags_and_numbers(online):
    server, facts, _ = online
    task = server.tasks[facts["first"]]
    assert (task["name"], task["type"], task["status"]) == ("cifar100", "training", "completed")
    assert set(task["tags"]) == {"cifar100", "noisy_topk"}
    assert task["hyperparams"]["train"]["lr"]["value"] == "0.0001"
    assert task["hyperparams"]["General"]["seed"]["value"] == "3"
    assert server.scalars(facts["first"]) == {
        ("loss", "train", 10): 0.5,
        ("loss", "train", 20): 0.125,  # of the resumed run, which began again after step 10
        ("Summary", "test/accuracy", -(2**31)): 0.75,
        ("Summary", "test/macro_f1", -(2**31)): 0.5,
    }


def test_plots_are_data_that_can_be_compared(online):
    server, facts, _ = online
    plots = {
        (event["metric"], event["variant"]): json.loads(event["plot_str"])
        for event in server.events
        if event["type"] == "plot" and event["task"] == facts["first"]
    }
    load, weight = plots["expert load", "test"]["data"]
    assert (load["name"], load["y"], weight["y"]) == ("load", [0.25, 0.75], [0.5, None])
    (matrix,) = plots["experts by class", "test"]["data"]
    assert matrix["z"] == [[0.125, 0.875], [1, 0]]
    assert (matrix["y"], matrix["x"]) == (["apple", "bear"], ["0", "1"])
    (curve,) = plots["reliability", "test"]["data"]
    assert (curve["x"], curve["y"]) == ([0.0, 1.0], [0.0, 0.75])
    assert "apple" in json.dumps(plots["scores", "test"])


def test_model_artifact_and_figure_are_on_the_file_server(online):
    server, facts, _ = online
    files = {name.rsplit("/", 1)[-1]: content for name, content in server.files.items() if facts["first"] in name}
    assert files["model.safetensors"] == b"weights"
    assert PNG in files.values()
    (model,) = [model for model in server.models.values() if model["task"] == facts["first"]]
    assert model["name"] == "cifar100" and model["uri"].endswith("model.safetensors")
    assert [artifact["key"] for artifact in server.tasks[facts["first"]]["execution"]["artifacts"]] == ["evaluation"]


def test_a_resumed_run_continues_its_task_if_it_exists(online):
    server, facts, _ = online
    assert facts["again"] == facts["first"]
    assert [task | {"page": None} for task in facts["listed"]] == [
        {"mode": "clearml", "task_id": facts["first"], "page": None, "whole": True}
    ]
    assert facts["first"] in facts["listed"][0]["page"]
    assert facts["still listed"] == facts["listed"]
    assert facts["lost"] not in (facts["first"], "0" * 32)
    # The new task lacks nothing: it was given the numbers of before.
    assert server.scalars(facts["lost"]) == {("loss", "train", 10): 0.5, ("loss", "train", 20): 0.125}
    assert server.tasks[facts["lost"]]["status"] == "failed"
    assert server.tasks[facts["lost"]]["status_reason"] == "out of memory"


def test_a_later_evaluation_is_a_child_task_of_the_training(online):
    server, facts, _ = online
    task = server.tasks[facts["evaluation"]]
    assert (task["parent"], task["type"], task["name"]) == (facts["first"], "testing", "cifar100")
    assert server.scalars(task["id"])["Summary", "test/accuracy", -(2**31)] == 0.625
    assert ("loss", "train", 10) not in server.scalars(task["id"])  # which the training's task has


def test_a_fetched_run_equals_its_folder(online):
    _, facts, done = online
    assert (facts["fetched"]["name"], facts["fetched"]["config"]) == ("cifar100", CONFIG)
    assert facts["fetched"]["metrics"] == {"accuracy": 0.75, "macro_f1": 0.5, "expert_load": [0.25, 0.75]}
    assert facts["fetched single"]["metrics"] == {"accuracy": 0.625, "specialisation": {"normalised": 0.5}}
    assert "asking\nasked\n" in done.stderr  # the SDK adds nothing to the one line
    kind, message = facts["unknown"]
    assert kind == "UserError" and f"has no task {'f' * 32}" in message and "\n" not in message


def test_an_offline_session_is_imported(online):
    server, facts, _ = online
    task = server.tasks[facts["imported"]]
    assert task["name"] == "train" and task["hyperparams"]["train"]["epochs"]["value"] == "3"
    assert server.scalars(facts["imported"]) == {
        ("loss", "train", 10): 0.5,
        ("Summary", "test/accuracy", -(2**31)): 0.5,
    }


def test_parts_missing_in_the_sdk_import_are_added(online):
    server, facts, _ = online
    task = server.tasks[facts["imported"]]
    assert task["status"] == "failed"
    model = next(model for model in server.models.values() if model["task"] == facts["imported"])
    assert (model["framework"], model["labels"]) == ("PyTorch", {"apple": 0, "bear": 1})
    (artifact,) = [artifact for artifact in task["execution"]["artifacts"] if artifact["key"] == "offline model"]
    assert model["uri"] == artifact["uri"] and facts["imported"] in model["uri"]
    assert server.files[model["uri"].removeprefix(server.url)] == b"weights"


def test_a_run_that_starts_from_another_names_its_input_model(online):
    server, facts, _ = online
    (output,) = server.tasks[facts["first"]]["models"]["output"]
    (taken,) = server.tasks[facts["later"]]["models"]["input"]
    assert taken["model"] == output["model"]
    model = server.models[output["model"]]
    assert (model["framework"], model["labels"]) == ("PyTorch", {"apple": 0, "bear": 1})


def test_the_images_of_a_dataset_come_from_the_server(online):
    _, facts, done = online
    assert facts["dataset"] == [["cat/0.png"], ["cat/0.png"]]
    assert "pets/dogs is not a finished dataset on the ClearML server" in facts["no dataset"]
    said = done.stderr.partition("asking for a dataset\n")[2].partition("asked\n")[0]
    assert "\n" not in facts["no dataset"] and said == ""
