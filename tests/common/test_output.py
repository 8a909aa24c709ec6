"""Errors and output: one line for a failure, and output that cannot be written."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import evaluate
import train
from common import errors
from common.errors import exit_code_of


def test_a_traceback_only_with_debug(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("sys.argv", ["train.py"])
    assert exit_code_of(fail) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "ZeroDivisionError" in line and "test_output.py:" in line and "--debug" in line
    monkeypatch.setattr("sys.argv", ["train.py", "--debug"])
    assert exit_code_of(fail) == 1
    assert "Traceback" in capsys.readouterr().err
    for program in (train, evaluate):
        monkeypatch.setattr("sys.argv", ["program", "--debug", "--nonsense", "1"])
        assert exit_code_of(program.main) == 2
        assert "Traceback" in capsys.readouterr().err


def test_missing_memory_is_reported_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    for greedy in (lambda: torch.empty(2**55), lambda: bytearray(2**55)):
        assert exit_code_of(greedy) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: out of memory") and line.count("\n") == 1 and "--train.batch_size" in line


def test_a_system_error_names_its_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert exit_code_of((tmp_path / "none").read_text) == 1
    assert f"error: {tmp_path}/none: No such file or directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115, a terminal that takes nothing any more
    errors.say("lost")


def full_disk():
    return open("/dev/full", "w")


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(
    ("output", "words"),
    [(full_disk, "standard output cannot be written: No space"), (unread_pipe, "")],
)
def test_unwritable_output_does_not_stop_work_on_files(monkeypatch, capsys, tmp_path, output, words, lasting):
    def work():
        print("begun", flush=True)
        (tmp_path / "result").write_text("whole")
        print("done")

    with monkeypatch.context() as patch, output() as stream:
        patch.setattr("sys.argv", ["train.py"])
        patch.setattr(sys, "stdout", stream)
        assert exit_code_of(work, lasting) == 1
        assert sys.stdout is stream
        stream.flush()  # as Python does at exit: nothing is left that could fail
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == bool(words)
    assert (tmp_path / "result").exists() == lasting


def test_lost_buffered_lines_are_an_error(monkeypatch, capsys):
    for main in (lambda: print("all"), lambda: evaluate.parse(["--help"])):
        with monkeypatch.context() as patch, open("/dev/full", "w") as stream:
            patch.setattr(sys, "stdout", stream)
            assert exit_code_of(main) == 1
        assert capsys.readouterr().err.count("standard output cannot be written") == 1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # closed before the program started
        assert exit_code_of(lambda: print("nothing")) == exit_code_of(lambda: evaluate.parse(["--help"])) == 0


def test_a_program_ends_with_its_exit_code_while_a_thread_still_works():
    code = "import threading, time; from common.errors import exit_process; "
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); print('said', end=''); exit_process(2)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "said"), ended.stderr
