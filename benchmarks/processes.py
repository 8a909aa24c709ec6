"""Benchmarks with several processes: sections that run one after another, and their results.

A benchmark names its worker, a module that calls `work` with the available sections. Rank 0 writes the result of a
section before the next one starts. If a section fails, or takes longer than its limit, one line reports it, the reason
is stored instead of a result, and the following sections run in new processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch.profiler import ProfilerActivity, profile

from assembly.pipeline import pick_device
from benchmarks.common import Parser, synchronise
from common.distributed import joined, started, world
from common.errors import one_line, say

ROOT = Path(__file__).resolve().parent.parent
LOOK = 0.2  # seconds between two checks for results of the processes
START = 120.0  # limit in seconds until their first section


def add_options(parser: Parser, names: Sequence[str], limit: float) -> None:
    """The options of every benchmark with several processes. names: its sections."""
    parser.add_numbers("--processes", [1, 2], "numbers of processes, each with its own GPU")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=names,
        default=list(names),
        metavar="NAME",
        help=f"sections to run (default {' '.join(names)})",
    )
    parser.add_argument("--limit", type=float, default=limit, help=f"seconds for each section (default {limit:g})")


def measured(
    worker: str,
    number: int,
    options: argparse.Namespace,
    names: Sequence[str],
    words: list[str],
    keep: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The result of each section of a worker with this number of processes, by name; {"failed": reason} for a failure.

    worker: name of its module. words: its options, in addition to those that `work` reads. keep: receives
    all results so far whenever there are new ones.
    """
    found: dict[str, Any] = {"processes": number}

    def add(new: dict[str, Any]) -> None:
        found.update(new)
        keep(dict(found))

    while left := [name for name in names if name not in found]:
        add(_once(worker, number, options, left, words, add))
    return found


def _once(
    worker: str,
    number: int,
    options: argparse.Namespace,
    names: list[str],
    words: list[str],
    keep: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The sections up to the first that fails; at least one."""
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "found.json", Path(folder) / "said.txt"
        run = [sys.executable, "-m", worker, "--found", str(out), "--device", options.device, *words, "--do", *names]
        with said.open("w", encoding="utf-8") as file:
            each = [_start(run, rank, number, port, file) for port in [_free_port()] for rank in range(number)]
            try:
                late = _wait(each, out, options.limit, keep)
            finally:
                for process in each:
                    process.kill()
                    process.wait()
        found = _read(out)
        failed = next((name for name in names if name not in found), None)
        if failed is not None:
            why = f"took more than {options.limit:g} s" if late else _error_in(said.read_text(encoding="utf-8"))
            say(f"{failed}, {number} processes: {why}")
            found[failed] = {"failed": why}
        return found


def _start(run: list[str], rank: int, size: int, port: int, output: IO) -> subprocess.Popen:
    """One process with the environment variables of torchrun, which itself takes seconds to start and to stop."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen(run, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _wait(
    each: list[subprocess.Popen], out: Path, limit: float, keep: Callable[[dict[str, Any]], Any] = lambda new: None
) -> bool:
    """Wait until all have ended, and pass new results to `keep`; True if a section has taken too long."""
    done, since = 0, time.monotonic() + START
    while any(process.poll() is None for process in each):
        time.sleep(LOOK)
        now, found = time.monotonic(), _read(out)
        if len(found) > done:
            keep(found)
        if len(found) > done or (out.exists() and since > now):
            done, since = len(found), now
        if now - since > limit:
            return True
    return False


def _read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def _error_in(text: str) -> str:
    lines = text.splitlines()
    said = [line for line in lines if line.startswith("error")] or [line for line in lines if "Error" in line][-1:]
    return one_line((said or lines[-1:] or ["ended without a word"])[0], 300)


def failure(found: Any) -> str | None:
    """The reason why a section has no result (None: it has one)."""
    if found is None:
        return "not measured"
    return found.get("failed") if isinstance(found, dict) else None


def merged(path: Path, rows: list[dict]) -> list[dict]:
    """These rows, one per number of processes, and rows of earlier calls for other numbers."""
    kept = {}
    with suppress(OSError, ValueError, KeyError):
        kept = {row["processes"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for row in rows:
        kept[row["processes"]] = {**kept.get(row["processes"], {}), **row}
    return [kept[number] for number in sorted(kept)]


def work(names: Sequence[str], sections: dict[str, Callable[..., Any]]) -> None:
    """In one of the processes: run the requested sections, each called with the options and the device.

    names: the integer options of the sections, besides --tiny.
    """
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--found", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--do", nargs="+")
    options, found = parser.parse_args(), {}
    with started():
        device = pick_device(options.device)
        with joined(device):
            _write(options.found, found)
            for name in options.do:
                torch.manual_seed(0)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)  # or a section would report the peak of earlier ones
                found[name] = sections[name](options, device)
                _write(options.found, found)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            world().wait()


def _write(path: Path, found: dict[str, Any]) -> None:
    if world().first:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(path)


def exchange_of(run: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of a call spent on exchange between the processes, from `steps` calls under PyTorch's profiler.

    For the last process that arrives at an exchange, it takes only the time of the exchange itself: `all_to_all`, and
    `sums` for all others. The additional time in the other processes is `waiting`, averaged over the processes.
    """
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    world().wait()
    synchronise(device)
    with profile(activities=[kind]) as profiled:
        for _ in range(steps):
            run()
        synchronise(device)
    spans = [
        (event.time_range.start, "alltoall" in _plain(event.name), event.time_range.elapsed_us() / 1e6)
        for event in profiled.events() or ()
        if _plain(event.name).startswith(("nccldevkernel", "ncclkernel", "gloo:"))
    ]
    each = world().gather([span[1:] for span in sorted(spans)])
    seconds = {"all_to_all": 0.0, "sums": 0.0, "waiting": 0.0}
    for alike in zip(*each, strict=True):
        least = min(span[1] for span in alike)
        seconds["all_to_all" if alike[0][0] else "sums"] += least
        seconds["waiting"] += sum(span[1] - least for span in alike) / len(alike)
    return {name: value / steps for name, value in seconds.items()}


def _plain(name: str) -> str:
    """The name of an exchange, by NCCL or gloo; combined sending and receiving is an all-to-all."""
    return name.lower().replace("sendrecv", "alltoall").replace("_to_", "to")


def link_of(exchange: Callable[[int], Callable[[], Any]], device: torch.device, large: int) -> tuple[float, float]:
    """(seconds of an exchange of this size, of an almost empty one); slowest process, medians of twenty.

    exchange: maps a size to the call that does the exchange.
    """
    seconds = []
    for numbers in (large, 1024):
        once, samples = exchange(numbers), []
        for _ in range(25):
            synchronise(device)
            began = time.perf_counter()
            once()
            synchronise(device)
            samples.append(time.perf_counter() - began)
        seconds.append(max(world().gather(sorted(samples[5:])[10])))
    return seconds[0], seconds[1]
