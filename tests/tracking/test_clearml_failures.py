"""Failures with the real SDK: an invalid session, a refused login, a server that dies."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from clearml_process import CLOSE, OPEN, facts_of, run_python
from clearml_schema import complaint
from clearml_standin import StandIn

pytestmark = pytest.mark.slow  # each test is a process that imports the SDK


def test_an_invalid_session_is_reported_in_one_line(workplace, tmp_path):
    code = """
from tracking.send import send
(run / "junk.zip").write_bytes(b"junk")
for name, words in (("none.zip", "does not exist: name the file"), ("junk.zip", "is not an offline session")):
    try:
        send(run / name)
    except UserError as error:
        assert (error.exit_code, words in str(error), chr(10) in str(error)) == (2, True, False), error
    else:
        raise AssertionError(name)
"""
    with StandIn() as server:
        run_python(workplace, tmp_path, code, **server.environment())


def test_requests_outside_the_published_api_are_rejected():
    with StandIn() as server:
        assert complaint("tasks.nothing", {}) == "there is no endpoint tasks.nothing"
        assert complaint("tasks.create", {"name": "a", "type": "training"}) == ""
        assert "'dreaming' is not one of" in complaint("tasks.create", {"name": "a", "type": "dreaming"})
        assert "'name' is a required property" in complaint("tasks.create", {"type": "training"})
        assert "an event of type smell" in complaint("events.add_batch", [{"type": "smell"}])
        body = json.dumps({"name": 3, "type": "training"}).encode()
        with pytest.raises(HTTPError, match="400"):
            urlopen(Request(f"{server.url}/tasks.create", body, {"Content-Type": "application/json"}))
        (said,) = server.misfits
        assert said.startswith("tasks.create: CreateRequest, name: 3 is not of type 'string'") and not server.tasks
        server.misfits.clear()


def test_a_rejected_login_is_reported_and_auto_goes_offline(workplace, tmp_path):
    code = """
from tracking.clearml_runs import fetch_run
for attempt in (start, lambda: fetch_run("0" * 32)):
    try:
        attempt()
    except UserError as error:
        assert error.exit_code == 2 and "refused the login; correct the access and secret key" in str(error)
    else:
        raise AssertionError
tracker = open_tracker("auto", run, CONFIG, name="n")
tracker.scalars({"loss/train": 0.5}, step=10)
tracker.close()
assert tracker.mode == "offline"
assert [task["mode"] for task in tasks_of(run)] == ["offline"]
assert open_evaluation("auto", run, CONFIG, name="n").mode == "none"
"""
    with StandIn(refuse=True) as server:
        done = run_python(workplace, tmp_path, OPEN + code, **server.environment())
    assert server.tasks == {} and "refused the login" in done.stdout


@pytest.mark.parametrize("how", ["refuse", "hang"])
def test_a_server_that_dies_during_training_has_no_effect(workplace, tmp_path, how):
    """Training ends in seconds and prints what to do; an evaluation on the restarted server uploads the rest."""
    dying = f"""
(run / "a.bin").write_bytes(b"a")
tracker = start()
clearml_task.PROBE_SECONDS = clearml_task.CLOSE_SECONDS = 0.5
tracker.scalars({{"loss/train": 0.5}}, step=10, epoch=1)
die("{how}")
began = time.monotonic()
tracker.scalars({{"loss/train": 0.25}}, step=20, epoch=2)
tracker.summary({{"test/accuracy": 0.75}})
tracker.artifact("a", run / "a.bin")
assert time.monotonic() - began < 300  # it did not wait for the server, which never answers
tracker.close()
assert [task["whole"] for task in tasks_of(run)] == [False]
facts["task"] = tracker.task_id
"""
    after = """
tracker = open_evaluation("auto", run, CONFIG, name="n")
assert tracker.resends
tracker.summary({"test/accuracy": 0.75})
tracker.close()
facts["task"] = tracker.task_id
"""
    with StandIn() as server:
        done = run_python(workplace, tmp_path, OPEN + dying + CLOSE, **server.environment())
        training = facts_of(tmp_path)["task"]
        assert "ClearML was closed before it had finished" in done.stderr
        assert f"python evaluate.py {tmp_path} --tracking clearml sends everything again" in done.stderr
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss/train"] for line in lines] == [0.5, 0.25]
        if how == "hang":
            server.hanging.clear()
            run_python(workplace, tmp_path, OPEN + after + CLOSE, **server.environment())
            evaluation = facts_of(tmp_path)["task"]
            assert server.tasks[evaluation]["parent"] == training
            assert server.scalars(evaluation) == {
                ("loss", "train", 10): 0.5,
                ("loss", "train", 20): 0.25,
                ("Summary", "test/accuracy", -(2**31)): 0.75,
            }
