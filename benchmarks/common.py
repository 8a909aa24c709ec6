"""Shared by the benchmarks: options, timing, tables, JSON."""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from assembly.pipeline import pick_device
from common import arguments
from common.environment import device_name, versions
from common.errors import one_line
from training.graph import GraphedStep, worth_capturing
from training.step import TrainingStep

HEAD_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "cifar100_head.yaml"
PACKAGES = ("torch", "timm", "transformers", "mixture-of-experts", "st-moe-pytorch")


class Parser(arguments.Parser):
    """The options of every benchmark.

    tiny: options with a different default under --tiny, and that default. Whole numbers have a least value: 1, or the
    `least` of their add_argument.
    """

    def __init__(self, name: str, description: str, seconds: float, tiny: dict[str, Any] | None = None):
        self.least: dict[str, tuple[str, int]] = {}  # by destination: the option and its least value
        super().__init__(
            prog=f"-m benchmarks.{name}",
            usage="python %(prog)s [options]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--device", default="auto", help="auto (default), cpu, cuda, or cuda:1")
        out = Path("runs/benchmarks")
        self.add_argument(
            "--out", type=arguments.path_option, default=out, help=f"folder of the JSON file (default {out})"
        )
        self.add_argument(
            "--seconds", type=float, default=seconds, help=f"approximate time limit (default {seconds:g})"
        )
        self.add_argument("--tiny", action="store_true", help="quick trial with small defaults")
        self.tiny = tiny or {}

    def add_argument(self, *names: str, least: int = 1, **how: Any) -> argparse.Action:
        """As in argparse; least: the least value of a whole number."""
        added = super().add_argument(*names, **how)
        if how.get("type") is int:
            self.least[added.dest] = names[0], least
        return added

    def add_numbers(self, name: str, default: list[int], what: str, least: int = 1) -> None:
        """An option with several whole numbers; its help ends with the default."""
        shown = f"{what} (default {' '.join(map(str, default))})"
        self.add_argument(name, type=int, nargs="+", default=default, metavar="N", help=shown, least=least)

    def parse_known_args(self, args=None, namespace=None):
        options, rest = super().parse_known_args(args, namespace)
        if options.tiny:
            self.set_defaults(**self.tiny)
            options, rest = super().parse_known_args(args, namespace)
        for dest, (name, least) in self.least.items():
            value = getattr(options, dest)
            for number in value if isinstance(value, list | tuple) else [value]:
                if number is not None and number < least:
                    self.error(f"{name} is {number}: it must be at least {least}")
        return options, rest


@dataclass(frozen=True)
class Timing:
    """Seconds of n runs: the median and the range."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def milliseconds(self) -> str:
        """Median and range, such as 1.23 (1.20-1.31)."""
        return f"{1e3 * self.median:.3g} ({1e3 * self.low:.3g}-{1e3 * self.high:.3g})"


@dataclass(frozen=True)
class Failure:
    """The reason why a contestant has no result."""

    reason: str


def attempt(run: Callable[[], Any]) -> Any:
    """The result of `run`, or a Failure for any exception, so that one failing method does not stop the others."""
    try:
        return run()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            reason = "out of memory"
        elif isinstance(error, ModuleNotFoundError) and (package := str(error.name).replace("_", "-")) in PACKAGES:
            reason = f"not installed: pip install {package}"
        else:
            reason = one_line(f"{type(error).__name__}: {error}", 160)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Failure(reason)


class Limit:
    """The time limit of a benchmark, starting now."""

    def __init__(self, seconds: float):
        self.seconds, self.began = seconds, time.perf_counter()

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.began > self.seconds

    def check(self) -> None:
        """Raise TimeoutError if the time is over."""
        if self.over:
            raise TimeoutError(f"the {self.seconds:g} s of --seconds are over")


def captured(step: TrainingStep, graph: str, batch: int) -> TrainingStep | GraphedStep:
    """The step, replayed as a CUDA graph where training would do so under train.graph."""
    return GraphedStep(step, batch) if worth_capturing(graph, step.model, batch) else step


def require_finite(step: TrainingStep) -> None:
    """Raise ValueError if a step so far had a number that is not finite and was therefore skipped."""
    if found := step.numbers.check():
        raise ValueError(f"the {found[1]} is not finite after {found[0]} steps")


def timed(run: Callable[[], Any], device: torch.device, seconds: float, warm: int = 2, most: int = 100) -> Timing:
    """Time `run` repeatedly for about `seconds`, after `warm` uncounted runs.

    At least three times; if three runs exceed the time, only the first run, which loads kernels, is a warm-up.
    """
    _once(run, device)
    second = _once(run, device)
    samples = [second] if second > seconds else []
    for _ in range(0 if samples else warm - 2):
        _once(run, device)
    started = time.perf_counter()
    while len(samples) < 3 or (time.perf_counter() - started < seconds and len(samples) < most):
        samples.append(_once(run, device))
    return Timing.of(samples)


def _once(run: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, seconds: float) -> tuple[float, str]:
    """FLOP/s of the product of two large square matrices, as a reference, and the same in words.

    In bfloat16 on a GPU, and in float32 with smaller matrices on a CPU; ten products at a time, so that launches do not
    matter.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    ten = timed(lambda: [torch.mm(a, b, out=out) for _ in range(10)], device, seconds).median
    rate = 10 * 2 * size**3 / ten
    return rate, f"{rate / 1e12:.4g} TFLOP/s in {dtype}"


def memory_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    size = 2**29 if device.type == "cuda" else 2**24
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / timed(lambda: b.copy_(a), device, 0.5).median


def width_of_cost(cost: Callable[[int], int], goal: int) -> int:
    """The number of hidden units whose cost, a linear function of it, is closest to `goal`."""
    one, two = cost(1), cost(2)
    return 1 + round((goal - one) / (two - one))


def start(options: argparse.Namespace) -> torch.device:
    """The device of the options. Raises UserError if it is not available."""
    return pick_device(options.device)


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date of a measurement."""
    found = {"python": platform.python_version(), **versions(PACKAGES)}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return {"device": device_name(device), "versions": found, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}


def header(title: str, where: dict[str, Any]) -> str:
    """The lines above a table."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return f"{title}\n{where['device']}; {versions}; {where['date']}"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table that reads as text and as Markdown."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(options: argparse.Namespace, name: str, where: dict[str, Any], **values: Any) -> None:
    """Write the results as JSON to --out, and print the path."""
    print(f"\nwritten to {save(options, name, where, **values)}")


def save(options: argparse.Namespace, name: str, where: dict[str, Any], **values: Any) -> Path:
    """Write the results as JSON to --out. Returns the path."""
    path = options.out / f"{name}{'_tiny' if options.tiny else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a program that is stopped here leaves the earlier results
    part.write_text(json.dumps({**where, **values}, indent=1, default=vars) + "\n", encoding="utf-8")
    return part.replace(path)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, which is never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")  # otherwise the last line was truncated
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without a truncated one; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
