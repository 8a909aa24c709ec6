"""Progress of a long loop: a bar on a terminal, and elsewhere a line every half minute.

    with meter("epoch 3/40", total=45_000) as done:
        for batch in batches:
            ...
            done(len(batch))

A bar is drawn only if both standard output and standard error are terminals; with `train.py | tee log`, or under an
agent, bars and lines would share a line. Text that is printed while a bar is shown goes above it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from tqdm import tqdm

from common.errors import say

SECONDS = 30.0  # between two lines
LOOK = 0.5  # seconds between two updates of the note, which may wait for the device


class Meter:
    """The progress of a loop, shown as a bar or in lines. Call it with the number of units that were done.

    total: units of the loop. later: units of the following loops, which count in the remaining time. note: called for
    more text to show. shown: whether lines are printed.
    """

    next_line = 0.0  # when the next line is due, for all meters of this process

    def __init__(self, label: str, total: int, done: int, unit: str, later: int, bar: tqdm | None, shown: bool = True):
        self.shown = shown
        self.label, self.total, self.done, self.unit, self.later, self.bar = label, total, done, unit, later, bar
        self.note: Callable[[], str] | None = None
        self._from: tuple[float, int] | None = None  # when and at which unit counting began, after the start-up
        self._checked = time.perf_counter()

    def __call__(self, units: int) -> None:
        self.done += units
        now = time.perf_counter()
        if self._from is None:
            self._from = (now, self.done)
        if self.bar is not None:
            if self.note is not None and now > self._checked + LOOK:
                self.bar.set_postfix_str(self.note(), refresh=False)
                self._checked = time.perf_counter()
            self.bar.update(units)
        elif self.shown and now > Meter.next_line and now > self._from[0]:
            say(self.line(now))
            Meter.next_line = now + SECONDS

    def line(self, now: float) -> str:
        """`epoch 3/40: 8,192 of 45,000 images, 3,100 images/s, 9 min 12 s left, loss 1.204`."""
        began, first = self._from or (now, self.done)
        rate = (self.done - first) / max(now - began, 1e-9)
        words = [f"{self.label}: {self.done:,} of {self.total:,} {self.unit}s", f"{_rounded(rate)} {self.unit}s/s"]
        if rate > 0:
            words.append(f"{duration((self.total - self.done + self.later) / rate)} left")
        return ", ".join([*words, *([self.note()] if self.note else [])])


@contextmanager
def meter(
    label: str, total: int, done: int = 0, unit: str = "image", later: int = 0, shown: bool = True
) -> Iterator[Meter]:
    """A Meter for the block. done: units that were done before. shown: false for all but one of several at once."""
    Meter.next_line = Meter.next_line or time.perf_counter() + SECONDS
    if not (shown and _is_terminal(sys.stdout) and _is_terminal(sys.stderr)):
        yield Meter(label, total, done, unit, later, None, shown)
        return
    out, err = sys.stdout, sys.stderr
    terminal = err.terminal if isinstance(err, _Above) else err  # for a bar within another
    bar = tqdm(total=total, initial=done, desc=label, unit=unit, leave=False, file=terminal, dynamic_ncols=True)
    with bar, redirect_stdout(_Above(out, bar)), redirect_stderr(_Above(err, bar)):
        yield Meter(label, total, done, unit, later, bar)


class _Above:
    """A terminal with a bar: written text replaces the bar, and the bar is drawn again below."""

    def __init__(self, stream: TextIO, bar: tqdm):
        self._stream, self._bar = stream, bar
        self.terminal: TextIO = stream.terminal if isinstance(stream, _Above) else stream

    def write(self, text: str) -> int:
        self._bar.clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def duration(seconds: float) -> str:
    """4000 as "1 h 7 min", 67 as "1 min 7 s", 6.71 as "6.7 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
