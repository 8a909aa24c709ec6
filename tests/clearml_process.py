"""Run code that uses ClearML's SDK in a separate process, because the SDK keeps its state in classes and threads."""

import atexit
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

from conftest import ROOT, import_lazy_modules, in_a_fork

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
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, str(run)],
        env=_settings(workplace) | environment,
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _settings(workplace: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CLEARML_", "TRAINS_"))}
    return clean | {
        "PYTHONPATH": str(ROOT),
        "CLEARML_CONFIG_FILE": str(workplace / "clearml.conf"),
        "CLEARML_CACHE_DIR": str(workplace / "cache"),
        "NO_PROXY": "127.0.0.1",
    }


def run_forked(workplace: Path, run: Path, code: str, **environment: str) -> str:
    """As run_python, in a fork of this process, for code with imports that take seconds. Returns what it printed."""

    def function() -> None:
        atexit._clear()  # of this process
        logging.root.handlers.clear()
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        for name in [name for name in sys.modules if name.split(".")[0] == "clearml"]:
            del sys.modules[name]  # it takes its settings from the environment
        settings = _settings(workplace) | environment
        os.environ.clear()
        os.environ.update(settings)
        os.chdir(workplace)
        sys.argv = ["-c", str(run)]
        try:
            exec(PREAMBLE + code, {"__name__": "__main__"})
        except BaseException:  # a fork shows no traceback by itself
            traceback.print_exc()
            raise
        atexit._run_exitfuncs()

    import_lazy_modules()
    status, output = in_a_fork(function)
    assert status == 0, output
    return output


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
