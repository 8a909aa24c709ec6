"""Work in a thread: it runs in the background, and its result or error appears when it is requested."""

import threading

import pytest

from common.ahead import Ahead
from common.errors import UserError


def test_a_call_continues_while_the_caller_does_something_else():
    may_end = threading.Event()
    begun = Ahead(lambda: may_end.wait(60) and 3)
    begun.check()  # does not wait either
    may_end.set()  # which a call in this thread would wait for
    assert begun.result() == 3 and begun.result() == 3


def test_an_error_is_raised_where_the_result_is_asked_for():
    def fails():
        raise UserError("no such folder")

    begun = Ahead(fails)
    for _ in range(2):
        with pytest.raises(UserError, match="no such folder"):
            begun.result()
    with pytest.raises(UserError, match="no such folder"):
        begun.check()
