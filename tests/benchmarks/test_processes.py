"""Sections of a benchmark with several processes: a failing or hanging section loses only its own result."""

import argparse
import json
import subprocess
import sys

import pytest

from benchmarks import processes
from benchmarks.processes import failure, measured, merged


@pytest.mark.slow
def test_a_failed_section_is_reported_in_one_line_and_later_ones_are_measured(capsys):
    options = argparse.Namespace(device="cpu", limit=60.0)
    names = ["good", "bad", "after"]
    kept = []
    found = measured("tests.benchmarks.worker_that_fails", 1, options, names, [], kept.append)
    assert found == {"processes": 1, "good": 1, "bad": {"failed": "ValueError: no room"}, "after": 2}
    assert kept[-1] == found and {"processes": 1, "good": 1, "bad": found["bad"]} in kept
    assert capsys.readouterr().err.count("\n") == 1
    assert failure(found["bad"]) == "ValueError: no room" and failure(1) is None and failure(None) == "not measured"


def test_a_hanging_section_ends_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOOK", 0.01)
    out = tmp_path / "found.json"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        out.write_text('{"a": 1}')
        kept = []
        assert processes._wait([process], out, 0.05, kept.append)
        assert kept == [{"a": 1}]  # stored although the process has not ended
        process.kill()
    assert not processes._wait([process], out, 0.05)


def test_earlier_results_are_kept(tmp_path):
    path = tmp_path / "found.json"
    assert merged(path, [{"processes": 2, "a": 1}]) == [{"processes": 2, "a": 1}]
    path.write_text(json.dumps({"rows": [{"processes": 2, "a": 1}, {"processes": 4, "a": 3}]}))
    rows = merged(path, [{"processes": 2, "b": 2}, {"processes": 1, "a": 0}])
    assert rows == [{"processes": 1, "a": 0}, {"processes": 2, "a": 1, "b": 2}, {"processes": 4, "a": 3}]
