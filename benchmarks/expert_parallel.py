"""A head with many experts on one GPU and on several: time of a step, memory, and the inputs of the cost model.

python -m benchmarks.expert_parallel            64 experts of 1024 units, 65,536 rows, 1 and 2 GPUs: about 3 min
python -m benchmarks.expert_parallel --tiny     a quick trial with gloo on a CPU

A step is forward, backward, exchange, clipping and AdamW, of one batch that the processes share, with parallel.experts
as many as they are. `all-to-all` and `waiting` are those of the forward pass, twice, measured apart: each exchange is
preceded by a small one that takes as long as the last process lets it wait. Predicted: benchmarks.scaling_model, from
steps on one device (all; half of the rows; half of rows and experts) and the bandwidth of a plain all-to-all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from assembly.pipeline import pick_device
from benchmarks.common import Parser, environment, header, start, synchronise, table, timed, write
from benchmarks.scaling_model import Inputs, compared
from common.distributed import joined, started, world
from common.errors import EnvironmentFault, exit_code_of
from config.optim import OptimConfig
from model import dispatcher
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from training.expert_parallel import ExpertParallel
from training.optim import build_optimizer
from training.parallel import Shares
from training.step import TrainingStep

ROOT = Path(__file__).resolve().parent.parent
CLASSES, TOP_K, NOTHING = 100, 2, 1024
TINY = {"rows": 256, "experts": 4, "units": 16, "features": 32, "seconds": 4.0}
NAMES = ("rows", "experts", "units", "features", "seconds")


def main(argv: list[str] | None = None) -> None:
    """Measure every number of processes, print the tables, write the JSON."""
    parser = Parser("expert_parallel", __doc__, seconds=100, tiny=TINY)
    parser.add_numbers("--processes", [1, 2], "numbers of processes, each with a GPU of its own")
    parser.add_argument("--rows", type=int, default=65_536, help="rows of a batch (default 65536)")
    parser.add_argument("--experts", type=int, default=64, help="experts (default 64)")
    parser.add_argument("--units", type=int, default=1024, help="hidden units of each (default 1024)")
    parser.add_argument("--features", type=int, default=4608, help="numbers a row (default 4608)")
    parser.add_argument("--worker", type=Path, help="one of the processes: the file of what they find")
    options = parser.parse_args(argv)
    if options.worker:
        work(options)
        return
    where = environment(start(options))
    each = [launched(number, options) for number in options.processes]
    alone, steps = each[0], [row["step"] for row in each]
    last = each[-1]
    inputs = Inputs.fitted(*alone["calibration"], rows=options.rows, experts=options.experts, **last["link"])
    found = {"rows": options.rows, "steps": steps, "inputs": vars(inputs)}
    print(header(f"{options.experts} experts of {options.units} units, {options.rows:,} rows, top-{TOP_K}", where))
    columns = ["processes", "ms a step", "against one", "expert memory a process", "peak GB"]
    columns += ["all-to-all", "waiting", "all else"]
    print(table(columns, [_line(row, steps[0]) for row in steps]))
    print(f"\nwithin the node {inputs.within:.4g} bytes/s, latency {1e6 * inputs.latency:.0f} us\n")
    print(compared(found, inputs))
    write(options, "expert_parallel", where, **found)


def launched(number: int, options) -> dict:
    """What so many processes find. Raises EnvironmentFault where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        words += ["-m", "benchmarks.expert_parallel", "--worker", str(out), "--device", options.device]
        words += [word for name in NAMES for word in (f"--{name}", str(getattr(options, name)))]
        variables = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        words = [sys.executable, *words]
        ran = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        if not out.exists():
            said = [line for line in ran.stderr.splitlines() if line.startswith("error")] or [ran.stderr[-300:]]
            raise EnvironmentFault(f"{number} processes: {said[0]}")
        return json.loads(out.read_text(encoding="utf-8"))


def work(options) -> None:
    """In one of the processes."""
    with started():
        device = pick_device(options.device)
        with joined(device):
            found: dict = {"step": measure(options, device, options.experts, options.rows)}
            if world().several:
                found["link"] = link(options, device)
            else:
                parts = [(options.experts, options.rows // 2), (options.experts // 2, options.rows // 2)]
                halves = [measure(options, device, *part)["seconds"] for part in parts]
                found["calibration"] = [found["step"]["seconds"], *halves]
                # Of one process alone there is no link.
                found["link"] = sizes(options) | {"within": 1.0, "between": 1.0, "latency": 0.0}
            if world().first:
                options.worker.write_text(json.dumps(found), encoding="utf-8")


def sizes(options) -> dict:
    """What the cost model needs to know of the model."""
    model = build(options, options.experts, "meta")
    of_experts = sum(value.numel() for value in model.moe.experts.parameters())
    total = sum(value.numel() for value in model.parameters())
    found = {"top_k": TOP_K, "features": options.features, "outputs": CLASSES}
    return found | {"common": total - of_experts, "each": of_experts // options.experts}


def build(options, experts: int, device: str = "cpu") -> VisionMoE:
    with torch.device(device):
        router = RouterConfig(kind="mixtral", top_k=TOP_K)
        parts = ExpertsConfig(sizes=[[options.units]] * experts)
        return VisionMoE((options.features,), CLASSES, NeckConfig(), router, parts)


def measure(options, device: torch.device, experts: int, rows: int) -> dict:
    """Seconds of a step on a batch of so many rows that the processes share, and its parts, and memory."""
    torch.manual_seed(0)
    model = build(options, experts)
    whole = expert_bytes(model)
    optim = OptimConfig()
    spread = ExpertParallel(model, world().size, "even", optim, device) if world().several else None
    model = model.to(device).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = TrainingStep(model, build_optimizer(model, optim), BalanceConfig(), 0.1, 1.0, "auto", experts=spread)
    share = Shares(world(), 0, device).of(rows)
    here = rows if share is None else share.sizes[share.rank]
    features_BF = torch.randn(here, options.features, device=device)
    labels_B = torch.randint(CLASSES, (here,), device=device)

    def run() -> None:
        step(features_BF, labels_B, False, share=share)

    for _ in range(3):
        run()
    count = world().broadcast(_steps_in(options.seconds / 6, lambda: timed_once(run, device)))
    seconds = [timed_once(run, device) for _ in range(count)]
    found = {"processes": world().size, "seconds": max(world().gather(sorted(seconds)[count // 2]))}
    found["memory"] = max(world().gather(expert_bytes(model))) / whole
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    found["peak"] = max(world().gather(peak))
    waiting, moving = split(run, device, count) if world().several else (0.0, 0.0)
    return found | {"waiting": waiting, "all_to_all": moving}


def _steps_in(seconds: float, once) -> int:
    return max(5, min(100, int(seconds / max(once(), 1e-6))))


def timed_once(run, device: torch.device) -> float:
    """Seconds of a call, with what it gave the device."""
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def expert_bytes(model: VisionMoE) -> int:
    """Weights, gradients and two moments of the experts that are here."""
    return 16 * sum(value.numel() for value in model.moe.experts.parameters())


def split(run, device: torch.device, count: int) -> tuple[float, float]:
    """(waiting, all-to-all) seconds of a step, twice those of its forward pass; means over the processes."""
    real, marks, token = dispatcher._all_to_all, [], torch.zeros(1, device=device)

    def watched(rows, come, go, group):
        synchronise(device)
        first = time.perf_counter()
        dist.all_reduce(token, group=group)
        synchronise(device)
        second = time.perf_counter()
        found = real(rows, come, go, group)
        found = found.wait() if hasattr(found, "wait") else found
        synchronise(device)
        marks.append((second - first, time.perf_counter() - second))
        return found

    dispatcher._all_to_all = watched
    try:
        for _ in range(count):
            run()
    finally:
        dispatcher._all_to_all = real
    own = torch.tensor(marks).sum(0) * 2 / count
    waiting, moving = torch.stack(world().gather(own)).mean(0).tolist()
    return waiting, moving


def link(options, device: torch.device) -> dict:
    """Sizes, bytes a second that a device sends in an all-to-all as large as those of a step, seconds of one."""
    count, size = world().size, options.rows // world().size * TOP_K * (options.features + CLASSES) // 2

    def exchange(numbers: int) -> float:
        sent = torch.zeros(numbers // count * count, dtype=torch.bfloat16, device=device)
        came = torch.empty_like(sent)
        return timed(lambda: dist.all_to_all_single(came, sent), device, 0.0, warm=5).median

    large, small = (max(world().gather(exchange(numbers))) for numbers in (max(size, NOTHING), NOTHING))
    bytes_sent = 2 * max(size, NOTHING) * (1 - 1 / count)
    within = bytes_sent / max(large - small, 1e-9)
    return sizes(options) | {"within": within, "between": within, "latency": small}


def _line(row: dict, first: dict) -> list[str]:
    whole, exchange = row["seconds"], row["all_to_all"] + row["waiting"]
    parts = [f"{1e3 * part:.2f}" for part in (row["all_to_all"], row["waiting"], whole - exchange)]
    speed, memory = f"{first['seconds'] / whole:.2f}x", f"{100 * row['memory']:.0f} %"
    return [str(row["processes"]), f"{1e3 * whole:.2f}", speed, memory, f"{row['peak']:.1f}", *parts]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
