"""A head with many experts on one GPU and on several: time of a step, memory, and the inputs of the cost model.

python -m benchmarks.expert_parallel            64 experts of 1024 units, 65,536 rows, 1 and 2 GPUs: about 2 min
python -m benchmarks.expert_parallel --tiny     a quick trial with gloo on a CPU

`step`: forward, backward, exchange, clipping and AdamW, for one batch shared by the processes, with parallel.experts
equal to their number. `each`: every process has as many rows as a single process. The gate has random weights, so that
loads are even. Parts of a step: all-to-all, other sums, the waiting time for the slowest process (mean over the
processes), and the rest, `compute`. Expert memory: weights, gradients and moments of a process's experts, as
allocated.

Inputs of benchmarks.scaling_model: `link`, a plain all-to-all, and three steps of one process that distributes its
experts over a group of itself: `half` has half of the experts and rows, as each of two processes has; `half_experts`
has all rows; `quarter` has a quarter of the experts and half of the rows.

Rows of earlier calls with other numbers of processes or other sections are kept.
"""

import sys

from benchmarks.common import Parser, environment, header, save, start, table
from benchmarks.expert_parallel_worker import NAMES, TOP_K
from benchmarks.processes import add_options, failure, measured, merged
from common.errors import exit_code_of

TINY = {"rows": 256, "experts": 8, "units": 16, "features": 32, "steps": 5}
ALONE, SEVERAL = ("step", "half", "half_experts", "quarter"), ("step", "link", "each")


def main(argv: list[str] | None = None) -> None:
    """Measure every number of processes, print the tables, write the JSON after each."""
    parser = Parser("expert_parallel", __doc__, seconds=100, tiny=TINY)
    add_options(parser, dict.fromkeys(ALONE + SEVERAL), limit=90)
    parser.add_argument("--rows", type=int, default=65_536, help="rows of a batch (default 65536)")
    parser.add_argument("--experts", type=int, default=64, help="experts (default 64)")
    parser.add_argument("--units", type=int, default=1024, help="hidden units of each expert (default 1024)")
    parser.add_argument("--features", type=int, default=4608, help="features per row (default 4608)")
    parser.add_argument(
        "--steps", type=int, default=40, help="steps, in five blocks; the median is reported (default 40)"
    )
    options = parser.parse_args(argv)
    where = environment(start(options))
    path = options.out / f"expert_parallel{'_tiny' if options.tiny else ''}.json"
    words = [word for name in NAMES for word in (f"--{name}", str(getattr(options, name)))]
    for number in options.processes:
        names = [name for name in (ALONE if number == 1 else SEVERAL) if name in options.sections]
        rows = merged(path, [measured("benchmarks.expert_parallel_worker", number, options, names, words)])
        save(options, "expert_parallel", where, rows=rows)
    print(header(f"{options.experts} experts of {options.units} units, top-{TOP_K}", where))
    columns = ["devices", "rows", "ms per step", "rows/s against one", "expert memory per process", "peak GB"]
    columns += ["compute", "all-to-all", "sums", "waiting", "largest over mean load"]
    print(table(columns, [line for row in rows for line in _lines(row, rows[0])]))
    print(f"\nwritten to {path}")


def _lines(row: dict, first: dict) -> list[list[str]]:
    """The results for one number of processes; `first` is the reference for speed and memory."""
    alone = first.get("step")
    known = alone is not None and failure(alone) is None and first["processes"] == 1
    lines = []
    for name in (name for name in ("step", "each") if name in row):
        found = row[name]
        if why := failure(found):
            lines.append([str(row["processes"]), why, *[""] * 9])
            continue
        cells = [str(row["processes"]), f"{found['rows']:,}", f"{1e3 * found['seconds']:.2f}"]
        speed, memory = "", f"{found['expert_bytes'] / 1e9:.2f} GB"
        if known:
            speed = f"{found['rows'] / found['seconds'] * alone['seconds'] / alone['rows']:.2f}x"
            memory += f", {100 * found['expert_bytes'] / alone['expert_bytes']:.0f} %"
        parts = [found.get(part, 0.0) for part in ("all_to_all", "sums", "waiting")]
        cells += [speed, memory, f"{found['peak'] / 1e9:.1f}"]
        cells += [f"{1e3 * part:.2f}" for part in (found["seconds"] - sum(parts), *parts)]
        lines.append([*cells, f"{found['largest_over_mean']:.3f}"])
    return lines


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
