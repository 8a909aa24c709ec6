"""Training, a head with many experts and extraction on one GPU and on several GPUs; where the time goes.

python -m benchmarks.devices                          on 1 and 2 GPUs of one machine, about 7 min
python -m benchmarks.devices --processes 1 2 4        on up to 4 GPUs
python -m benchmarks.devices --tiny                   a quick trial with gloo on a CPU

`training`: the default recipe as in train.py, compiled and captured, on random images and a ViT with random weights,
which does not affect the time; several processes share its batch. `each`: every process has as many images as a single
process; `half`: a single process has half of them. The first epoch, which compiles, is not counted. `extraction`:
views of the recipe with experts behind the ViT, written to a file.

`head`: a head with many experts, distributed over the processes by parallel.experts: forward, backward, exchange,
clipping and AdamW, for one batch that they share. `head_each`: every process has as many rows as a single process. The
gate has random weights, so that loads are even. Expert memory: weights, gradients and moments of the experts of a
process, as allocated.

Parts of a step: all-to-all, other exchanges between the processes, the waiting time for the slowest process (mean over
the processes), and the rest, `compute`.

Inputs of benchmarks.scaling_model: `link`, a plain all-reduce; `head_link`, a plain all-to-all; and three steps of one
process that distributes the experts of a head over a group of only itself: `head_half` has half of the experts and
rows, as each of two processes has; `head_half_experts` has half of the experts and all rows; `head_quarter` has a
quarter of the experts and half of the rows.

Each section is stored as soon as it has been measured. Results of earlier runs with other numbers of processes or
other sections are kept.
"""

import sys

from benchmarks import devices_head, devices_worker
from benchmarks.common import Parser, environment, header, save, start, table
from benchmarks.processes import add_options, failure, measured, merged
from common.errors import exit_code_of

TINY = {"images": 96, "extracted": 96, "epochs": 2, "views": 2}
TINY |= {"rows": 256, "experts": 8, "units": 16, "features": 32, "steps": 5}
ALONE = ("training", "head", "extraction", "half", "head_half", "head_half_experts", "head_quarter")
SEVERAL = ("training", "head", "extraction", "link", "each", "head_link", "head_each")
LINES = {  # sections in the table: its title, and the section of one process that it is compared with
    "training": ("default recipe", "training"),
    "each": ("default recipe", "training"),
    "half": ("default recipe", "training"),
    "head": ("head", "head"),
    "head_each": ("head", "head"),
    "extraction": ("extraction", "extraction"),
}


def main(argv: list[str] | None = None) -> None:
    """Measure every number of processes, write the JSON after each section, print the table."""
    parser = Parser("devices", __doc__, seconds=420, tiny=TINY)
    add_options(parser, dict.fromkeys(ALONE + SEVERAL), limit=180)
    parser.add_argument("--images", type=int, default=20_000, help="training images (default 20000)")
    parser.add_argument("--extracted", type=int, default=50_000, help="images to extract (default 50000)")
    what = "of which the first is not counted (default %(default)s)"
    parser.add_argument("--epochs", type=int, default=4, least=2, help=f"epochs, {what}")
    parser.add_argument("--views", type=int, default=3, least=2, help=f"views, {what}")
    parser.add_argument("--rows", type=int, default=65_536, help="rows of a batch of the head (default 65536)")
    parser.add_argument("--experts", type=int, default=64, help="experts of the head (default 64)")
    parser.add_argument("--units", type=int, default=1024, help="hidden units of each expert (default 1024)")
    parser.add_argument("--features", type=int, default=4608, help="features per row of the head (default 4608)")
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of the head, in five blocks; the median counts (default 40)"
    )
    options = parser.parse_args(argv)
    where = environment(start(options))
    path = options.out / f"devices{'_tiny' if options.tiny else ''}.json"

    def keep(row: dict) -> None:
        save(options, "devices", where, rows=merged(path, [row]))

    for number in options.processes:
        for worker in (devices_worker, devices_head):
            words = [word for name in worker.NAMES for word in (f"--{name}", str(getattr(options, name)))]
            words += ["--tiny"] if options.tiny else []
            known = [name for name in (ALONE if number == 1 else SEVERAL) if name in options.sections]
            measured(worker.__name__, number, options, [name for name in known if name in worker.SECTIONS], words, keep)
    rows = merged(path, [])
    title = f"head: {options.experts} experts of {options.units} units, top-{devices_head.TOP_K}"
    print(header(f"Each process with its own device; {title}", where))
    columns = ["devices", "what", "images or rows per step", "per second", "speed-up", "ms per step", "compute"]
    columns += ["all-to-all", "other exchange", "waiting", "expert memory per process", "peak GB"]
    columns += ["largest over mean load"]
    lines = [line for name in LINES for row in rows if name in row for line in [_line(name, row, rows[0])]]
    print(table(columns, lines))
    print(f"\nwritten to {path}")


def _line(name: str, row: dict, first: dict) -> list[str]:
    """The result of a section; `first` has those of one process, if they were measured."""
    found, (title, reference) = row[name], LINES[name]
    cells = [str(row["processes"]), title]
    if why := failure(found):
        return [*cells, why, *[""] * 10]
    alone = first.get(reference) if first["processes"] == 1 else None
    alone = None if failure(alone) else alone
    cells += [f"{found[_unit(found)]:,}", f"{_speed(found):,.0f}"]
    cells += [f"{_speed(found) / _speed(alone):.2f}x" if alone else ""]
    if title == "extraction":
        return [*cells, *[""] * 8]
    parts = [found.get(part, 0.0) for part in ("all_to_all", "sums", "waiting")]
    cells += [f"{1e3 * part:.2f}" for part in (found["seconds"], found["seconds"] - sum(parts), *parts)]
    if title != "head":
        peak = found.get("peak_gib")
        return [*cells, "", f"{peak * 2**30 / 1e9:.1f}" if peak else "", ""]
    share = f", {100 * found['expert_bytes'] / alone['expert_bytes']:.0f} %" if alone else ""
    cells += [f"{found['expert_bytes'] / 1e9:.2f} GB{share}", f"{found['peak'] / 1e9:.1f}"]
    return [*cells, f"{found['largest_over_mean']:.3f}"]


def _unit(found: dict) -> str:
    return "rows" if "rows" in found else "batch"


def _speed(found: dict) -> float:
    """Images or rows per second."""
    return found["rows"] / found["seconds"] if "rows" in found else found["images_per_second"]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
