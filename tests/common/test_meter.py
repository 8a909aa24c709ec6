"""Progress: a bar on a terminal, lines elsewhere, and never both on one line."""

import io
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common import meter as module
from common.meter import Meter, duration, meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(Meter, "next_line", 0.0)
    return now


def test_a_line_every_half_minute_with_rate_and_time_left(clock, capsys):
    with meter("epoch 3/4", total=1000, done=100, later=1000) as done:
        done.note = lambda: "loss 1.5"
        for _ in range(8):
            clock.seconds += 8
            done(80)
    out, err = capsys.readouterr()
    # Counted from the first batch on, which was at 8 s: 80 images in 8 s are 10 images/s.
    assert err.splitlines() == [
        "epoch 3/4: 420 of 1,000 images, 10 images/s, 2 min 38 s left, loss 1.5",
        "epoch 3/4: 740 of 1,000 images, 10 images/s, 2 min 6 s left, loss 1.5",
    ]
    assert out == ""


def test_short_loops_share_the_half_minute(clock, capsys):
    for epoch in range(1, 7):
        with meter(f"epoch {epoch}/6", total=20) as done:
            for _ in range(2):
                clock.seconds += 6
                done(10)
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["epoch 3/6", "epoch 6/6"]


def test_a_first_batch_has_no_rate_yet(clock, capsys):
    with meter("test", total=3) as done:
        clock.seconds += 100
        done(1)
        assert capsys.readouterr().err == ""
        clock.seconds += 2
        done(1)
    assert capsys.readouterr().err == "test: 2 of 3 images, 0.5 images/s, 2.0 s left\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "err"), [(True, False), (False, True), (False, False)])
def test_bars_need_two_terminals(monkeypatch, clock, out, err):
    streams = [Terminal() if terminal else io.StringIO() for terminal in (out, err)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with meter("epoch 1/1", total=10) as done:
        for _ in range(10):
            done(1)
    assert [stream.getvalue() for stream in streams] == ["", ""]


ON_A_TERMINAL = """
import sys, time
from common.errors import warn
from common.meter import meter
print("before")
with meter("outer", 40) as outer:
    for number in range(40):
        with meter("inner", 4) as inner:
            for part in range(4):
                time.sleep(0.003)
                inner(1)
                if number % 10 == 5 and part == 2:
                    print(f"line {number}")
                    warn(f"number {number}")
        outer(1)
print("after")
"""


def test_lines_go_above_the_bar():
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = [sys.executable, "-c", ON_A_TERMINAL]
    with subprocess.Popen(words, cwd=ROOT, stdout=terminal, stderr=terminal, close_fds=True) as process:
        os.close(terminal)
        written = b""
        try:
            while chunk := os.read(control, 4096):
                written += chunk
        except OSError:  # what Linux says when the other side is closed
            pass
        assert process.wait() == 0
    os.close(control)
    text = written.decode()
    assert "outer" in text and "inner" in text and "image/s" in text
    expected = ["before", *(line for n in (5, 15, 25, 35) for line in (f"line {n}", f"warning: number {n}")), "after"]
    assert [line for line in _screen(text) if line] == expected


def _screen(text: str) -> list[str]:
    """The final content of a terminal that supports line feeds, carriage returns and moving the cursor up."""
    rows, row, column = {0: {}}, 0, 0
    for part in re.findall(r"\x1b\[A|.", text, re.DOTALL):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        else:
            rows.setdefault(row, {})[column] = part
            column += 1
    filled = ["".join(cells.get(c, " ") for c in range(1 + max(cells, default=0))) for _, cells in sorted(rows.items())]
    return [line.strip() for line in filled]


def test_durations_are_readable():
    assert [duration(6.71), duration(67.2), duration(4020)] == ["6.7 s", "1 min 7 s", "1 h 7 min"]
