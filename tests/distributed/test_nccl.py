"""Two processes with a GPU each, over NCCL: the same as one, in captured steps too, and as quick to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from distributed_helpers import in_processes
from test_equivalence import BATCH, HEADS, SAMPLES, close, data, head, train

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
    "--train.precision float32 --train.compile never --tracking none"
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
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
    return {"losses": torch.stack(losses).cpu(), **{k: v.cpu() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize("name", ["mixtral", "noisy_topk"])
def test_captured_steps_are_those_of_one_process(name):
    alone, each = captured(ALONE, name), in_processes(2, captured, name, device="cuda")
    for found in each:
        close(found, alone)


def test_steps_as_they_are():
    each = in_processes(2, train, HEADS["capacity"], device="cuda")  # of tensors on the CPU, beside NCCL
    close(each[0]["state"], train(ALONE, HEADS["capacity"])["state"])


def torchrun(size: int, *words: object) -> subprocess.Popen:
    """`train.py WORDS` in so many processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "train.py"]
    return subprocess.Popen(
        [*run, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("spread", ["", "--parallel.experts 2 --parallel.placement work"], ids=["data", "experts"])
@pytest.mark.parametrize("recipe", [HEAD, BLOCKS], ids=["head", "blocks"])
def test_a_run_on_two_gpus_is_that_of_one(recipe, spread, tmp_path):
    states = []
    for size in (1, 2):
        words = [*recipe.split(), *WORDS.split(), *(spread.split() if size == 2 else [])]
        process = torchrun(size, *words, "--run_dir", tmp_path / str(size))
        said, _ = process.communicate()
        assert process.returncode == 0, said
        states.append(load_checkpoint(tmp_path / str(size) / "checkpoints" / "last.pt")["model"])
    for name, value in states[0].items():
        assert torch.allclose(states[1][name].double(), value.double(), atol=1e-3), name
    results = [json.loads((tmp_path / size / "evaluation" / "metrics.json").read_text()) for size in "12"]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=0.05)


def test_a_shared_gpu_is_refused(tmp_path):
    process = torchrun(2, *HEAD.split(), *WORDS.split(), "--device", "cuda:0", "--run_dir", tmp_path / "run")
    said, _ = process.communicate()
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "share a GPU" in errors[0] and not (tmp_path / "run").exists()


def trained(tmp_path, *words: object) -> subprocess.Popen:
    """A long run of two processes that has written a checkpoint."""
    process = torchrun(2, *HEAD.split(), *WORDS.split(), "--train.epochs", 100_000, *words, "--run_dir", tmp_path)
    while not (tmp_path / "checkpoints" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.5)
    return process


def disturb(process: subprocess.Popen, number: int) -> tuple[str, float]:
    """Send a signal to one of the two; what is said by both in one line, and the seconds until all have ended."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    began = time.monotonic()
    os.kill(int(children.stdout.split()[1]), number)
    said, _ = process.communicate()
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    return line, time.monotonic() - began


def test_a_killed_process_ends_the_other(tmp_path):
    line, seconds = disturb(trained(tmp_path / "run"), signal.SIGKILL)
    assert re.match(r"error: rank \d has died", line) and seconds < 60


def test_a_process_that_hangs_is_found_by_the_time_limit(tmp_path):
    # torchrun waits half a minute for the one that does not even end.
    line, _ = disturb(trained(tmp_path / "run", "--parallel.timeout", 10), signal.SIGSTOP)
    assert re.match(r"error: rank \d did not respond in time", line)
