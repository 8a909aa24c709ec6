"""How several processes end together, apart from the processes."""

import socket
import subprocess
import sys

import pytest

from common.ending import _Others


class Store:
    """A store in which rank 1 finishes after the first question about it."""

    def __init__(self, pid: int, finishes: bool):
        self.pid, self.answers = pid, iter((False, finishes))

    def check(self, keys):
        return next(self.answers) if keys == ["done/1"] else keys == ["process/1"]

    def get(self, key):
        return f"{socket.gethostname()} {self.pid}".encode()

    def set(self, key, value):
        pass


@pytest.mark.parametrize(("finishes", "lost"), [(True, None), (False, 1)])
def test_a_process_that_finishes_between_two_questions_is_not_lost(finishes, lost, monkeypatch):
    monkeypatch.setattr(_Others, "_watch", lambda others: None)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert _Others(0, 2, Store(ended.pid, finishes))._lost() == lost
