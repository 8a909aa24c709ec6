"""Tracking without a working server: the messages, and training continues. Endless waiting fails a test."""

import socket
from contextlib import closing

import pytest
from clearml_process import dead_server, records, run_python

pytestmark = pytest.mark.slow  # each test is a process that imports the SDK


def test_failing_and_hanging_sdk_do_not_affect_training(workplace, tmp_path):
    code = """
import threading, clearml
clearml_task.CLOSE_SECONDS = clearml_task.UPLOAD_SECONDS = 0.5
tracker = open_tracker("offline", run, CONFIG, name="n")
def fail(*args, **kwargs): raise RuntimeError("the SDK raises anything")
clearml.Logger.report_scalar = fail
for step in range(5):
    tracker.scalars({"loss/train": 0.5}, step=step)
hung = threading.Event()
clearml.Task.upload_artifact = lambda *args, **kwargs: hung.set() or threading.Event().wait()
tracker.artifact("a", Path(clearml_task.__file__))
assert hung.wait(300)
tracker.close()
again = open_tracker("auto", run / "again", CONFIG, name="n")
assert again.mode == "none"
"""
    done = run_python(workplace, tmp_path, code)
    assert len(records(tmp_path)) == 5
    assert done.stderr.count("the SDK raises anything") == 1
    assert "before it had finished" in done.stderr


SOON = "clearml_task.PROBE_SECONDS = 0.5\n"
REFUSED = """
import clearml
try:
    open_tracker("clearml", run, CONFIG, name="n")
except EnvironmentFault as error:
    assert "does not answer" in str(error) and "\\n" not in str(error)
else:
    raise AssertionError
"""
AUTO = """
import clearml
for name in sys.argv[2:] or ["first", "offline before"]:
    tracker = open_tracker("auto", run, CONFIG, name=name)
    assert tracker.mode == "offline"
    tracker.close()
"""


def test_dead_server(workplace, tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        done = run_python(workplace, tmp_path, REFUSED + AUTO, **dead_server(taken.getsockname()[1]))
    assert done.stdout.count("does not answer") == 2  # one line per run


def test_server_that_accepts_and_never_answers(workplace, tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        run_python(workplace, tmp_path, SOON + REFUSED, **dead_server(silent.getsockname()[1]))


def test_name_server_that_hangs(workplace, tmp_path):
    hang = "import socket, threading\nsocket.getaddrinfo = lambda *args, **kwargs: threading.Event().wait()\n"
    done = run_python(workplace, tmp_path, SOON + hang + "sys.argv.append('once')\n" + AUTO, **dead_server(1))
    assert done.stdout.count("does not answer") == 1


def test_no_server_and_no_package_are_clear_errors(workplace, tmp_path):
    code = """
def message(mode):
    try:
        open_tracker(mode, run, CONFIG, name="n")
    except UserError as error:
        return type(error).__name__ + str(error)
assert "UserErrorno ClearML server is configured" in message("clearml"), message("clearml")
for name in [name for name in sys.modules if name.startswith("clearml")]:
    del sys.modules[name]
sys.modules["clearml"] = None
assert "clearml" in message("offline")
assert open_tracker("auto", run, CONFIG, name="n").mode == "none"
"""
    run_python(workplace, tmp_path, code)
