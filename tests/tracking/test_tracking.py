"""Tracking: what is written where; neither a dead server nor a failing SDK stops training.

The SDK keeps its state in classes and threads, so each test that loads it runs it in a separate process.
"""

import json
import zipfile

import pytest
from clearml_process import records, run_python
from conftest import PNG

from common.errors import UserError
from tracking.tracker import open_tracker


def test_mode_none_writes_lines_and_does_not_use_clearml(workplace, tmp_path):
    code = """
tracker = open_tracker("none", run, CONFIG, name="n")
values = {"loss/train": 1, "loss/validation": float("nan"), "a/b": float("-inf"), "a/c": None}
tracker.scalars(values, step=7, epoch=2)
tracker.summary({"accuracy": 0.5})
tracker.figure("t", "s", run / "missing.png")
tracker.table("t", "s", ["a"], [[1]])
tracker.artifact("a", run / "missing")
tracker.model(run / "missing", "m", ["a", "b"])
tracker.close()
tracker.close(failed="again")
tracker.scalars({"loss/train": 2.0}, step=8)
assert (tracker.mode, tracker.task_id) == ("none", None)
assert "clearml" not in sys.modules
"""
    done = run_python(workplace, tmp_path, code)
    nulls = {"loss/validation": None, "a/b": None, "a/c": None}
    assert records(tmp_path) == [{"step": 7, "epoch": 2, "loss/train": 1.0} | nulls]
    assert "metrics.jsonl" in done.stdout


def test_resume_drops_later_and_truncated_lines(tmp_path):
    lines = [json.dumps({"step": step, "epoch": None, "loss/train": 0.5}) + "\n" for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 20, "lo')
    tracker = open_tracker("none", tmp_path, {}, name="n", resume_step=20)
    tracker.scalars({"loss/train": 0.25}, step=25)
    tracker.close()
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 25]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_resume_step_only_a_truncated_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    open_tracker("none", tmp_path, {}, name="n").close()
    assert records(tmp_path) == [{"step": 10}]


def test_unknown_mode_and_unwritable_file(tmp_path):
    with pytest.raises(UserError, match="auto, clearml, offline, none"):
        open_tracker("on", tmp_path, {}, name="n")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written") as caught:
        open_tracker("none", tmp_path / "file", {}, name="n")
    assert caught.value.exit_code == 1


@pytest.fixture(scope="module")
def session(workplace):
    """One offline run that uses everything: (its output, the files of its session by name, its facts)."""
    run = workplace / "run"
    run.mkdir()
    (run / "figure.png").write_bytes(PNG)
    (run / "best.json").write_text('{"epoch": 2}')
    (run / "model.safetensors").write_bytes(b"weights")
    code = """
import signal
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)]
tracker = open_tracker("auto", run, CONFIG, name="cifar100", tags=["moe", "test"], task_id="offline-0")
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)]
values = {"loss/train": 0.5, "loss/validation": float("nan"), "accuracy/test": 0.25}
tracker.scalars(values, step=100, epoch=1)
tracker.scalars({"loss/train": 0.125}, step=200, epoch=2)
tracker.summary({"accuracy": 0.75, "bad": float("inf")})
tracker.table("per class", "test", ["class", "f1"], [["apple", 0.5], ["bear", float("nan")]])
tracker.figure("load", "validation", run / "figure.png")
tracker.artifact("best", run / "best.json")
tracker.artifact("missing", run / "missing")
tracker.figure("missing", "too", run / "missing.png")
tracker.model(run / "model.safetensors", "vision-moe", ["apple", "bear"])
tracker.close(failed="out of memory")
tracker.close()
second = open_tracker("offline", run / "second", {}, name="next")
second.close()
archive = str(Path(os.environ["CLEARML_CACHE_DIR"]) / "offline" / f"{tracker.task_id}.zip")
facts = {"zip": archive, "mode": tracker.mode, "id": tracker.task_id, "second": second.task_id,
         "environment": [key for key in os.environ if "OFFLINE" in key]}
(run / "facts.json").write_text(json.dumps(facts))
"""
    done = run_python(workplace, run, code)
    facts = json.loads((run / "facts.json").read_text())
    with zipfile.ZipFile(facts["zip"]) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return done, files, facts


def events(files: dict[str, bytes]) -> list[dict]:
    return [event for line in files["metrics.jsonl"].splitlines() for event in json.loads(line)]


@pytest.mark.slow
def test_offline_session_contains_scalars(session):
    _, files, _ = session
    scalars = {
        (event["metric"], event["variant"], event["iter"]): event["value"]
        for event in events(files)
        if event["type"] == "training_stats_scalar"
    }
    assert scalars.pop(("Summary", "accuracy", -(2**31))) == 0.75
    assert scalars == {
        ("loss", "train", 100): 0.5,
        ("accuracy", "test", 100): 0.25,
        ("loss", "train", 200): 0.125,
    }


@pytest.mark.slow
def test_offline_session_contains_hyperparameters_and_tags(session):
    _, files, _ = session
    task = json.loads(files["task.json"])
    assert (task["project_name"], task["name"]) == ("Vision MoE", "cifar100")
    assert set(task["tags"]) == {"moe", "test", "failed"}
    sections = task["hyperparams"].items()
    values = {(name, key): item["value"] for name, items in sections for key, item in items.items()}
    assert values["General", "seed"] == "3"
    assert values["train", "lr"] == "0.0001"
    assert values["train", "nested/warmup"] == "5"
    assert values["experts", "hidden"] == "[[256, 128], [512]]"


@pytest.mark.slow
def test_offline_session_contains_files_and_table(session):
    _, files, _ = session
    by_name = {name.rsplit("/", 1)[-1]: content for name, content in files.items()}
    assert by_name["best.json"] == b'{"epoch": 2}'
    assert by_name["model.safetensors"] == b"weights"
    assert PNG in files.values()
    assert {artifact["key"] for artifact in json.loads(files["task.json"])["execution"]["artifacts"]} == {
        "best",
        "vision-moe",
    }
    image = next(event for event in events(files) if event["type"] == "training_debug_image")
    assert (image["metric"], image["variant"], image["iter"]) == ("load", "validation", 0)
    plot = next(event for event in events(files) if event["type"] == "plot")
    assert "apple" in plot["plot_str"] and "NaN" not in plot["plot_str"]


@pytest.mark.slow
def test_offline_run_prints_what_to_do_and_leaves_no_trace(session):
    done, _, facts = session
    assert facts["mode"] == "offline"
    assert facts["environment"] == []
    assert facts["second"] not in (None, facts["id"])
    assert "no ClearML server is configured" in done.stdout
    assert f"python -m tracking.send {facts['zip']}" in done.stdout


@pytest.mark.slow
def test_an_error_of_the_sdk_is_reported_once(session):
    done, _, _ = session
    assert done.stderr.count("tracking: ClearML failed") == 1
    assert "missing" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"CLEARML_OFFLINE_MODE": "1"}, {}])
def test_default_configuration_reports_from_no_subprocess(workplace, tmp_path, environment):
    """Without a clearml.conf the SDK would use a subprocess, which is slow to feed and slow to close."""
    code = """
import psutil
tracker = open_tracker("auto", run, CONFIG, name="n")
assert tracker.mode == "offline"
for step in range(10):
    tracker.scalars({f"load/expert_{i}": 0.5 for i in range(20)}, step=step)
def python_children():
    children = []
    for child in psutil.Process().children():
        try:
            children += [child.cmdline()] if "python" in child.name() else []
        except psutil.NoSuchProcess:  # it has ended, if only just now
            pass
    return children
until = time.monotonic() + 60
while (children := python_children()) and time.monotonic() < until:
    time.sleep(0.1)  # a fork that is about to become another program; what reports would stay
assert not children, children
tracker.close()
if os.environ.get("CLEARML_OFFLINE_MODE"):
    assert os.environ["CLEARML_OFFLINE_MODE"] == "1"
    try:
        open_tracker("clearml", run, CONFIG, name="n")
    except UserError as error:
        assert "CLEARML_OFFLINE_MODE" in str(error)
    else:
        raise AssertionError
"""
    absent = {"CLEARML_CONFIG_FILE": str(tmp_path / "absent.conf")}
    run_python(workplace, tmp_path, code, **absent, **environment)
