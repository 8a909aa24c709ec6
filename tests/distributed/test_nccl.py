"""Two processes with one GPU each, over NCCL: equal to one process, also in captured steps, with a quick end.

All processes of this file are started at once, because starting takes most of their time.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from distributed_helpers import in_processes
from test_equivalence import BATCH, HEADS, SAMPLES, data, head, train

from benchmarks.processes import exchange_of
from common.distributed import ALONE
from model.balance import BalanceConfig
from storage.checkpoint import load_checkpoint
from training.graph import GraphedStep
from training.parallel import Shares
from training.step import TrainingStep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WORDS = (
    "--data.max_per_class 25 --router.warmup_steps 3 --train.batch_size 27 --train.epochs 3 --train.save_every 1 "
    "--train.precision float32 --backbone.precision float32 --train.compile never --tracking none"
)
HEAD = (
    "--config configs/digits.yaml --neck.kind pooled --neck.dropout 0 --backbone.features [cls:1,mean:1] "
    "--experts.dropout 0"
)
BLOCKS = "--config configs/digits_blocks.yaml --train.patch_dropout 0.2"


def captured(world, name: str) -> dict:
    """Eight steps on whole batches, of which the last are replayed as CUDA graphs."""
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    model = head(**{key: value for key, value in HEADS[name].items() if key != "balance"}).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)  # as captured steps need
    step = TrainingStep(model, optimizer, BalanceConfig(switch=0.1), 0.1, 0.5, "float32")
    torch.manual_seed(7)
    shares = Shares(world, 7, device)
    run = GraphedStep(step, shares.samples_here(BATCH), shares.generator)
    losses = []
    features_N, labels_N = (tensor.to(device) for tensor in data(blocks=False))
    for number in range(8):
        index_B = (torch.arange(BATCH, device=device) + number) % SAMPLES
        share = shares.of(BATCH)
        own_B = index_B if share is None else share.own(index_B)
        options = {} if share is None else {"share": share}
        losses.append(run(features_N[own_B], labels_N[own_B], False, **options).loss.clone())
    assert run.captured.graphs  # replayed in the end
    run.captured.release()
    return {"losses": torch.stack(losses).cpu(), **{k: v.cpu() for k, v in model.state_dict().items()}}


def exchanged(world) -> dict[str, float]:
    """The seconds of one all-to-all and two sums, for which the first process waits."""
    device = torch.device("cuda", world.local_rank)
    sent = torch.ones(2**20, device=device)
    came, busy = torch.empty_like(sent), torch.ones(4096, 4096, device=device)

    def once() -> None:
        for _ in range(20 * world.rank):
            busy @ busy
        dist.all_to_all_single(came, sent)
        dist.all_reduce(sent)
        dist.all_reduce(sent)

    once()
    return exchange_of(once, device, 3)


CASES = {
    "mixtral": lambda world: captured(world, "mixtral"),
    "noisy_topk": lambda world: captured(world, "noisy_topk"),
    "as they are": lambda world: train(world, HEADS["capacity"])["state"],  # of tensors on the CPU, beside NCCL
    "exchanged": exchanged,
}


def every_case(world) -> dict:
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = case(world)
        except Exception:  # of any kind: shown by the test of this case, and the others go on
            found[name] = traceback.format_exc()
    return found


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The largest difference of each tensor."""
    assert found.keys() == expected.keys()
    return {name: (found[name].double() - value.double()).abs().max().item() for name, value in expected.items()}


def largest(values: dict[str, float]) -> str:
    """Three of the largest, in words."""
    return ", ".join(f"{name} {values[name]:.2g}" for name in sorted(values, key=values.__getitem__)[:-4:-1])


RECIPES = {"head": HEAD, "blocks": BLOCKS}
SPREAD = {"data": "", "experts": "--parallel.experts 2 --parallel.placement work"}
SECONDS = 90.0  # for each run
SIGNALS = {"killed": (signal.SIGKILL, ""), "hanging": (signal.SIGSTOP, "--parallel.timeout 10")}


class Started:
    """Runs of train.py by name, all at once, on pairs of GPUs in turn."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, {}
        for recipe, words in RECIPES.items():
            self.start(f"{recipe} alone", 1, words)
            for how, more in SPREAD.items():
                self.start(f"{recipe} {how}", 2, f"{words} {more}")
        self.start("shared", 2, f"{HEAD} --device cuda:0")
        pool = ThreadPoolExecutor(2)
        self.ends = {}
        for name, (number, more) in SIGNALS.items():
            self.start(name, 2, f"{HEAD} --train.epochs 100000 {more}")
            self.ends[name] = pool.submit(self.disturbed, name, number)

    def start(self, name: str, size: int, words: str) -> None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = seen.split(",")
        first = 2 * (len(self.runs) % (len(gpus) // 2))
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "train.py"]
        self.runs[name] = subprocess.Popen(
            [*run, *WORDS.split(), *words.split(), "--run_dir", str(self.run(name))],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + 2])},
            stdout=self.output(name).open("w"),
            stderr=subprocess.STDOUT,
        )

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def run(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def said(self, name: str) -> tuple[str, int]:
        """The output of a finished run, and its exit code."""
        try:
            code = self.runs[name].wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        return self.output(name).read_text(), code

    def disturbed(self, name: str, number: int) -> tuple[str, float]:
        """Send one of two processes a signal after a checkpoint; the line both report, and seconds until then."""
        process, limit = self.runs[name], time.monotonic() + SECONDS
        while not (self.run(name) / "checkpoints" / "last.pt").exists():
            assert process.poll() is None and time.monotonic() < limit, self.output(name).read_text()
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        began = time.monotonic()
        victim = int(children.stdout.split()[1])
        os.kill(victim, number)
        while not (lines := re.findall("^error.*", self.output(name).read_text(), re.MULTILINE)):
            assert time.monotonic() < began + SECONDS, self.output(name).read_text()
            time.sleep(0.2)
        seconds = time.monotonic() - began
        if number == signal.SIGSTOP:  # or torchrun would wait half a minute for it
            os.kill(victim, signal.SIGKILL)
        said, code = self.said(name)
        assert code is not None and len(lines) == 1, said
        return lines[0], seconds


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    found = Started(tmp_path_factory.mktemp("runs"))
    yield found
    for process in found.runs.values():
        if process.poll() is None:
            process.terminate()  # torchrun, which ends its processes


@pytest.fixture(scope="module")
def each(started):
    return in_processes(2, every_case, device="cuda")


def test_exchanges_are_distinguished_from_waiting(each):
    for found in each:
        seconds = found["exchanged"]
        assert isinstance(seconds, dict), seconds
        assert seconds["all_to_all"] > 0 and seconds["sums"] > 0 and seconds["waiting"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if name != "exchanged"])
def test_steps_are_those_of_one_process(name, each):
    alone = CASES[name](ALONE)
    for found in each:
        assert isinstance(found[name], dict), found[name]
        apart = differences(found[name], alone)
        print(f"{name}: largest differences {largest(apart)}")
        assert max(apart.values()) < 1e-5


@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_on_two_gpus_is_that_of_one(recipe, how, started):
    folders = []
    for name in (f"{recipe} alone", f"{recipe} {how}"):
        said, code = started.said(name)
        assert code == 0, said
        folders.append(started.run(name))
    alone, several = [load_checkpoint(folder / "checkpoints" / "last.pt")["model"] for folder in folders]
    apart = differences(several, alone)
    means = {name: (several[name].double() - value.double()).abs().mean().item() for name, value in alone.items()}
    print(f"{recipe} {how}: largest differences {largest(apart)}, largest means of a tensor {largest(means)}")
    # Sums in another order change single weights whose gradient is almost zero by as much as a step of AdamW.
    assert max(means.values()) < 1e-5
    results = [json.loads((folder / "evaluation" / "metrics.json").read_text()) for folder in folders]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=0.05)


def test_a_shared_gpu_is_rejected(started):
    said, _ = started.said("shared")
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "share a GPU" in errors[0] and not started.run("shared").exists()


def test_a_killed_process_ends_the_other(started):
    line, seconds = started.ends["killed"].result()
    assert re.match(r"error: rank \d has died", line) and seconds < 60


def test_a_hanging_process_is_found_by_the_time_limit(started):
    line, seconds = started.ends["hanging"].result()
    assert seconds < 60
    assert re.match(r"error: rank \d did not respond in time", line)
