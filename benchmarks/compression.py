"""Savings and costs of compress.py: every method on trained runs, with bytes, FLOPs and latency against macro-F1.

python -m benchmarks.compression --runs runs/cifar100 runs/cifar100_head     each student trains as long as its run
python -m benchmarks.compression --runs RUN --methods prune int8 --seconds 300
python -m benchmarks.compression --tiny                                      a quick trial on digits, on a CPU

Each method creates a separate run in a temporary folder; choices use the validation images, and the test images are
scored once. Budgets in points of validation macro-F1 are 0.2 for removal, 0.1 for quantisation, and 1 for removal
followed by distillation. The results are written after each method. If a method fails, the table shows the reason; a
method that does not fit into the time limit is not started.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from assembly.compressing import compress
from assembly.compression_steps import AUTO, CALIBRATIONS, Plan
from assembly.loading import OpenRun, open_run
from benchmarks.common import Failure, Parser, attempt, environment, header, save, start, table, write
from common.arguments import add_shared_options, path_option
from common.errors import UserError, exit_code_of
from evaluation.compression import EXPERT_HEADER, expert_rows, shown

ROOT = Path(__file__).resolve().parent.parent
METHODS: dict[str, dict[str, Any]] = {
    "prune": {"prune": AUTO, "budget": 0.2},
    "merge": {"merge": 0},  # to half of the experts, or to top_k
    "int8": {"quantise": "int8", "protect": AUTO, "budget": 0.1},
    "fp8": {"quantise": "fp8", "protect": AUTO, "budget": 0.1},
    "prune, int8": {"prune": AUTO, "quantise": "int8", "protect": AUTO, "budget": 0.1},
    "merge, taught": {"merge": 0, "distil": "sparse"},
    "prune, taught": {"prune": AUTO, "budget": 1.0, "distil": "sparse"},
    "sparse student": {"distil": "sparse"},
    "dense student": {"distil": "dense"},
    "dense student, int8": {"distil": "dense", "quantise": "int8", "protect": AUTO, "budget": 0.1},
}
TINY = {"epochs": 1, "rows": 64, "latency": 0.05}
TINY_TRAINING = "--data.max_per_class 30 --train.epochs 2 --train.batch_size 32 --router.warmup_steps 2 --tracking none"
COLUMNS = ("expert_bytes", "file_bytes", "active_parameters", "flops", "latency_1", "latency_256")
SCORES = ("macro_f1_validation", "macro_f1_test")


def main(argv: list[str] | None = None) -> None:
    """Compress, print the tables, write the JSON."""
    parser = Parser("compression", __doc__, seconds=3600, tiny=TINY)
    parser.add_argument(
        "--runs", type=path_option, nargs="+", default=[], metavar="RUN", help="folders of trained runs"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="which")
    parser.add_argument("--epochs", type=int, help="epochs of students (default: those of the run)")
    parser.add_argument("--rows", type=int, default=1024, help="rows for the calibration of each expert (default 1024)")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds per latency measurement (default 1)")
    add_shared_options(parser, "data.root", "backbone.weights")
    options = parser.parse_args(argv)
    device = start(options)
    if not options.runs and not options.tiny:
        raise UserError("name trained runs after --runs, or --tiny to train small ones")
    where = environment(device)
    print(header("Compression of trained runs", where))
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or [_train(Path(folder), name) for name in ("digits", "digits_blocks")]
        rows: list[dict[str, Any]] = []
        until = time.perf_counter() + options.seconds
        for run in runs:
            before = len(rows)
            for row in measure_run(run, options, Path(folder), until):
                rows.append(row)
                save(options, "compression", where, rows=rows)
            _print(run, rows[before:])
    write(options, "compression", where, rows=rows)


def _train(folder: Path, recipe: str) -> Path:
    """A small run of a recipe on digits."""
    words = ["train.py", "--config", f"configs/{recipe}.yaml", *TINY_TRAINING.split(), "--run_dir", folder / recipe]
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr)
    return folder / recipe


def measure_run(run: Path, options: argparse.Namespace, folder: Path, until: float) -> Iterator[dict[str, Any]]:
    """The result of each method for a run, as in compression.json, or the reason why there is none; prints each one.

    until: the value of time.perf_counter after which no further method starts.
    """
    opened = attempt(lambda: open_run(run, options.device, options.root, options.weights))
    for number, method in enumerate(name for name in METHODS if name in options.methods):
        out = folder / f"{run.name}-{number}"
        if isinstance(opened, Failure):
            found = opened
        elif time.perf_counter() >= until:
            found = Failure("no time left")
        else:
            found = attempt(partial(_measure, opened, method, options, out))
        row = {"run": run.name, "method": method} | (vars(found) if isinstance(found, Failure) else found)
        said = (
            row.get("reason") or f"macro-F1 {shown('macro_f1', row['after']['macro_f1_test'])}, {row['seconds']:.0f} s"
        )
        print(f"{run.name}: {method}: {said}", file=sys.stderr, flush=True)
        yield row


def _print(run: Path, rows: list[dict[str, Any]]) -> None:
    """A table of all methods, and one of the experts for each that quantises."""
    print(f"\n{run.name}\n")
    print(table(["method", *(name.replace("_", " ") for name in (*COLUMNS, *SCORES)), "seconds"], _lines(rows)))
    for row in rows:
        if "quantise" in METHODS[row["method"]] and "experts" in row:
            print(f"\n{row['method']}: {_calibrations(row)}\n")
            print(table([*EXPERT_HEADER, *(f"error, {name}" for name in CALIBRATIONS)], expert_lines(row)))


def _measure(opened: OpenRun, method: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    began = time.perf_counter()
    opened.config.tracking = "none"
    asked = dict(METHODS[method])
    if "merge" in asked:
        asked["merge"] = max(opened.config.router.top_k, len(opened.config.experts.sizes) // 2)
    epochs = options.epochs if "distil" in asked else None
    plan = Plan(**asked, rows=options.rows, seconds=options.latency, epochs=epochs, worth_images=0)
    results = compress(opened, plan, out, say=lambda line: print(line, file=sys.stderr))
    return results["compression"] | {"seconds": time.perf_counter() - began}


def _lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for the original run, then one for each method, with its share of the bytes."""
    done = [row for row in rows if "before" in row]
    scored = done[0]["before"] if done else {}
    lines = [["as trained", *(shown(name, scored[name]) for name in (*COLUMNS, *SCORES)), "-"]] if done else []
    for row in rows:
        if "reason" in row:
            lines.append([row["method"], row["reason"], *["-"] * (len(COLUMNS) + len(SCORES))])
            continue
        cells = [shown(name, row["after"][name]) for name in COLUMNS]
        for place, name in enumerate(COLUMNS[:2]):
            cells[place] += f" ({100 * row['after'][name] / row['before'][name]:.1f} %)"
        for name in SCORES:
            before, after = row["before"][name], row["after"][name]
            change = "" if before is None else f" ({100 * (after - before):+.2f})"
            cells.append(shown(name, after) + change)
        lines.append([row["method"], *cells, f"{row['seconds']:.0f}"])
    return lines


def _calibrations(row: dict[str, Any]) -> str:
    """Macro-F1 and mean error for each calibration of the scales."""
    said = []
    for calibration, found in _tried(row).items():
        errors = [error for error in found["errors"] if error is not None]
        mean = 100 * sum(errors) / len(errors)
        fewest = "" if found["fewest_rows"] is None else f", at least {found['fewest_rows']} rows for an expert"
        said.append(f"{calibration} {100 * found['macro_f1_validation']:.2f} %, mean error {mean:.3f} %{fewest}")
    return "; ".join(said)


def expert_lines(row: dict[str, Any]) -> list[list[str]]:
    """The rows for EXPERT_HEADER, each followed by the errors of this expert under each calibration."""
    cells, rows, calibrations = expert_rows(row), row["experts"], _tried(row).values()
    last = [number for number, one in enumerate(rows) if one["becomes"] is None and one.get("points_lost") is not None]
    for number, (line, one) in enumerate(zip(cells, rows, strict=True)):
        # Shared experts and the linear head are the last ones, in both lists.
        place = last.index(number) - len(last) if number in last else one["becomes"]
        errors = [None if place is None else found["errors"][place] for found in calibrations]
        line += ["–" if error is None else f"{100 * error:.3f} %" for error in errors]
    return cells


def _tried(row: dict[str, Any]) -> dict[str, Any]:
    """The results of each calibration."""
    return next(step["calibrations"] for step in row["steps"] if step["step"] == "quantise")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
