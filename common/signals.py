"""Ctrl-C, SIGTERM and a closed terminal end a program at the next safe point.

    with stoppable():            # around a program: signals raise Interrupted
        ...
        with defer_signals:           # around a critical section: signals wait until its end
            ...

A second signal ends the process at once. A signal that the caller ignores stays ignored, so that a run under nohup
or in the background of a shell script continues.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Interrupted, say

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class _DeferredSignals:
    """A critical section that defers signals; one object per process, may be nested."""

    def __init__(self):
        self.reset()

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._depth -= 1
        if self._pending and not self._depth and not self._raised and kind is None:
            self._raised = True
            raise Interrupted(self._pending)

    @property
    def pending(self) -> int:
        """The pending signal; 0 for none."""
        return self._pending

    def raise_pending(self) -> None:
        """Raise Interrupted for a pending signal, inside of critical sections too."""
        if self._pending and not self._raised:
            self._raised = True
            raise Interrupted(self._pending)

    @contextmanager
    def ignoring_repeats(self) -> Iterator[None]:
        """As the object itself, but ignores a second signal, because torchrun sends one besides the terminal's."""
        self._patient = True
        with self:
            yield

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal."""
        if self._pending and not self._patient:
            os._exit(128 + number)
        if self._pending:
            return
        self._pending = number
        if self._depth:
            say("finishing the step and saving" + ("" if self._patient else "; a second signal exits at once"))
        else:
            self._raised = True
            raise Interrupted(number)

    def reset(self) -> None:
        """Clear a signal that has been handled."""
        self._depth, self._pending, self._raised, self._patient = 0, 0, False, False


defer_signals = _DeferredSignals()


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into Interrupted inside the block; does nothing off the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    defer_signals.reset()
    for number in before:
        signal.signal(number, defer_signals.receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
