"""Run code that uses ClearML's SDK in a separate process, because the SDK keeps its state in classes and threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

CONFIG = {
    "seed": 3,
    "note": None,
    "train": {
        "lr": 1e-4,
        "epochs": 3,
        "amp": True,
        "patience": None,
        "betas": [0.9, 0.999],
        "nested": {"decay": None, "warmup": 5},
        "name": "adamw",
    },
    "experts": {"hidden": [[256, 128], [512]], "mixed": [None, "a", 1.5, False], "none": []},
}
PREAMBLE = f"""
import json, os, sys, time
from pathlib import Path
import tracking.clearml_task as clearml_task
from tracking.tracker import open_tracker
from common.errors import EnvironmentFault, UserError
clearml_task.PROBE_SECONDS = 60.0  # a server in a busy process may take more than the usual three
run = Path(sys.argv[1])
CONFIG = {CONFIG!r}
"""


def run_python(workplace: Path, run: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code after PREAMBLE without the caller's ClearML settings, but with the given ones."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CLEARML_", "TRAINS_"))}
    clean |= {
        "PYTHONPATH": str(ROOT),
        "CLEARML_CONFIG_FILE": str(workplace / "clearml.conf"),
        "CLEARML_CACHE_DIR": str(workplace / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, str(run)],
        env=clean | environment,
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def dead_server(port: int) -> dict[str, str]:
    return {
        "CLEARML_API_HOST": f"http://127.0.0.1:{port}",
        "CLEARML_API_ACCESS_KEY": "key",
        "CLEARML_API_SECRET_KEY": "secret",
    }


OPEN = """
import urllib.request
from tracking.tasks import tasks_of
from tracking.tracker import open_evaluation
def start(**options):
    return open_tracker("clearml", run, CONFIG, name="cifar100", tags=["cifar100", "noisy_topk"], **options)
def die(how):
    urllib.request.urlopen(f"{os.environ['CLEARML_API_HOST']}/standin.die_{how}").read()
facts = {}
"""
CLOSE = """
(run / "facts.json").write_text(json.dumps(facts))
"""


def facts_of(run) -> dict:
    return json.loads((run / "facts.json").read_text())
