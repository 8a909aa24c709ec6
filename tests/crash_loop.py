"""Kill training repeatedly, resume it each time, and compare the result with an uninterrupted run.

python tests/crash_loop.py FOLDER KILLS SEED

Prints a line of JSON. Imports and features are needed only once: every run is a fork of this process that calls
train.main. The kills are real, by another process, at random times; the runs are on digits, with the bundled ViT.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import sklearn.metrics  # noqa: F401, which like the two below a run imports where it needs it: here once for all
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from assembly import pipeline
from common.errors import exit_code_of
from common.signals import stoppable
from config.command_line import Invocation, parse_command_line
from evaluation import figures, report

EPOCHS, SAVE_EVERY = 18, 3
PATIENCE = 600  # limit in seconds for work of about one second: a busy machine is slow, but does not hang
ROOT = Path(__file__).resolve().parent.parent
OPTIONS = f"""--config {ROOT}/configs/digits.yaml --data.max_per_class 20 --backbone.features [cls:1,mean:1]
--neck.kind pooled --experts.sizes [[8],[16],[32]] --router.warmup_steps 20 --router.dropout 0.1 --router.hidden [16]
--augment.flip true --features.views 2 --train.epochs {EPOCHS} --train.batch_size 24 --train.save_every {SAVE_EVERY}
--tracking none --device cpu""".split()


def share_features() -> None:
    """Load and extract the shared inputs of all runs once."""
    config = parse_command_line(OPTIONS).config
    inputs = train.load_inputs(config)
    bank = pipeline.build_bank(config, inputs.splits, inputs.backbone, inputs.device)
    for split, views in (("train", (0, 1)), ("validation", (None,)), ("test", (None,))):
        for view in views:
            next(bank.batches(split, 1, view=view))
    train.load_inputs = lambda *arguments: inputs
    train.parse_command_line = lambda: _parsed(*sys.argv[1:])
    pipeline.build_bank = lambda *arguments: bank
    train.announce = lambda *arguments: print(f"run folder   {arguments[-1].run.path}", flush=True)
    figures.draw = lambda *arguments: []  # figures take seconds and are not compared
    report.write_report = lambda *arguments: None


@lru_cache
def _parsed(*arguments: str) -> Invocation:
    return parse_command_line(list(arguments))


def start(log: Path, *arguments: str) -> int:
    """Fork a run that writes to `log`. Returns its process id."""
    log.unlink(missing_ok=True)
    _parsed(*arguments)  # half a second, once for all attempts at a run
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["train.py", *arguments]
        code = 1
        try:
            code = exit_code_of(train.main)
        finally:
            os._exit(code)
    return pid


def finish(pid: int, seconds: float = PATIENCE) -> int:
    """Exit code of a process, negative for a signal that ended it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise SystemExit(f"a run hung for {seconds} s")


def strike(pid: int, log: Path, number: int, delay: float) -> int:
    """Send a signal `delay` seconds after training has begun. Returns the exit code."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and (not log.exists() or "run folder" not in log.read_text()):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.01)
    time.sleep(delay)
    if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        os.kill(pid, number)
    return finish(pid)


def outcome(run: Path) -> dict:
    """The results of a finished run that must not depend on interruptions."""
    last, best = (torch.load(run / "checkpoints" / name, weights_only=True) for name in ("last.pt", "best.pt"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    for measured in [name for name in metrics["cost"] if name.startswith(("training", "images", "peak", "latency"))]:
        metrics["cost"].pop(measured)
    return {
        "last": {k: last[k] for k in ("model", "ema", "optimizer", "random", "epoch", "step", "best", "improved")},
        "best": {k: best[k] for k in ("model", "epoch", "macro_f1")},
        "lines": [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines],
        "metrics": {key: value for key, value in metrics.items() if key != "environment"},  # contains the date
        "weights": (run / "model.safetensors").read_bytes(),
    }


def same(a, b) -> bool:
    """Whether two nested values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def epochs(run: Path) -> tuple[int, int, bool]:
    """The last logged epoch, the epoch of the checkpoint, and whether the checkpoint is in the middle of it."""
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    path = run / "checkpoints" / "last.pt"
    if not path.exists():
        path = path.with_name("last.previous.pt")
    logged = json.loads(lines[-1])["epoch"] if lines else 0
    if not path.exists():
        return logged, 0, False
    state = torch.load(path, weights_only=True)
    return logged, state["epoch"] - (state["progress"] is not None), state["progress"] is not None


def disturb(run: Path, rng: random.Random, kills: int, seen: dict) -> None:
    """Train in `run` to the end, after killing it up to `kills` times."""
    log = run.with_suffix(".log")
    while True:
        resume = (run / "config.yaml").exists()
        pid = start(log, *(["--resume", str(run)] if resume else ["--run_dir", str(run), *OPTIONS]))
        if seen["killed"] == kills:
            code = finish(pid)
            assert code == 0, log.read_text()
            return
        number = rng.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT])
        code = strike(pid, log, number, rng.uniform(0, 0.2))
        if (run / "evaluation" / "metrics.json").exists():  # the run was finished; the rest was Python's exit
            return
        assert code == (-number if number == signal.SIGKILL else 128 + number), (code, log.read_text())
        seen["killed" if number == signal.SIGKILL else "signalled"] += 1
        if run.exists():
            logged, kept, middle = epochs(run)
            seen["in_the_middle"] += middle
            seen["most_epochs_lost"] = max(seen["most_epochs_lost"], logged - kept)
            assert number == signal.SIGKILL or logged == kept


def twins(folder: Path) -> list[Path]:
    """Two runs at once that each choose a folder. Returns the folders."""
    before = Path.cwd()
    os.chdir(folder)
    pids = [start(folder / f"twin{i}.log", *OPTIONS) for i in range(2)]
    codes = [finish(pid) for pid in pids]
    os.chdir(before)
    assert codes == [0, 0], (folder / "twin0.log").read_text() + (folder / "twin1.log").read_text()
    return list((folder / "runs").iterdir())


def main(folder: Path, kills: int, seed: int) -> dict:
    """A summary, and whether every run equals an uninterrupted one."""
    with stoppable():
        share_features()
    rng = random.Random(seed)
    folders = twins(folder)
    expected = outcome(folders[0])
    equal = len(folders) == 2 and same(outcome(folders[1]), expected)
    seen = {"killed": 0, "signalled": 0, "runs": 0, "in_the_middle": 0, "most_epochs_lost": 0, "twins_equal": equal}
    seen["equal"] = True
    while seen["killed"] < kills:
        run = folder / f"run{seen['runs']}"
        disturb(run, rng, kills, seen)
        seen["runs"] += 1
        seen["equal"] &= same(outcome(run), expected)
        shutil.rmtree(run)
    longer = ["--resume", str(folders[0]), "--train.epochs", str(EPOCHS + 1)]
    assert finish(start(folder / "longer.log", *longer)) == 0, (folder / "longer.log").read_text()
    seen["longer"] = [line["epoch"] for line in outcome(folders[0])["lines"]] == list(range(1, EPOCHS + 2))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
