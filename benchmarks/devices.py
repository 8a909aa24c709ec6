"""Training and extraction on one GPU and on several GPUs of the same machine: images/s, and where a step's time goes.

python -m benchmarks.devices                          on 1 and 2 GPUs, about 5 min
python -m benchmarks.devices --processes 1 2 4        on up to 4 GPUs
python -m benchmarks.devices --tiny                   a quick trial with gloo on a CPU

`training`: the default recipe as in train.py, compiled and captured, on random images and a ViT with random weights,
which does not affect the time; several processes share its batch. `each`: every process has as many images as a single
process; `half`: a single process has half of them. The first epoch, which compiles, is not counted. `extraction`:
views of the recipe with experts behind the ViT, written to a file. `link`: a plain exchange. Parts of a step: the
exchange between the processes, the waiting time for the slowest process (mean over the processes), and the rest,
`compute`.

Rows of earlier calls with other numbers of processes or other sections are kept.
"""

import sys

from benchmarks.common import Parser, environment, header, save, start, table
from benchmarks.processes import add_options, failure, measured, merged
from common.errors import exit_code_of

TINY = {"images": 96, "extracted": 96, "epochs": 2, "views": 2}
ALONE, SEVERAL = ("training", "extraction", "half"), ("training", "extraction", "link", "each")


def main(argv: list[str] | None = None) -> None:
    """Measure every number of processes, print the table, write the JSON after each."""
    parser = Parser("devices", __doc__, seconds=300, tiny=TINY)
    add_options(parser, dict.fromkeys(ALONE + SEVERAL), limit=180)
    parser.add_argument("--images", type=int, default=20_000, help="training images (default 20000)")
    parser.add_argument("--extracted", type=int, default=50_000, help="images to extract (default 50000)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs, of which the first is not counted (default 4)")
    parser.add_argument("--views", type=int, default=3, help="views, of which the first is not counted (default 3)")
    options = parser.parse_args(argv)
    where = environment(start(options))
    path = options.out / f"devices{'_tiny' if options.tiny else ''}.json"
    words = [word for name in TINY for word in (f"--{name}", str(getattr(options, name)))]
    words += ["--tiny"] if options.tiny else []
    for number in options.processes:
        names = [name for name in (ALONE if number == 1 else SEVERAL) if name in options.sections]
        row = measured("benchmarks.devices_worker", number, options, names, words)
        rows = merged(path, [row])
        save(options, "devices", where, rows=rows)
    print(header("Each process with its own device", where))
    columns = ["devices", "what", "images per step", "images/s", "against one", "ms per step", "compute", "exchange"]
    print(table([*columns, "waiting"], [line for row in rows for line in _lines(row, rows[0])]))
    print(f"\nwritten to {path}")


def _lines(row: dict, first: dict) -> list[list[str]]:
    """The results for one number of processes; `first` is the reference for speed."""
    names = {"training": "training", "each": "training", "half": "training", "extraction": "extraction"}
    lines = []
    for name, title in ((name, title) for name, title in names.items() if name in row):
        found, alone = row[name], first.get(title)
        cells = [str(row["processes"]), title]
        if why := failure(found):
            lines.append([*cells, why, *[""] * 6])
            continue
        known = alone is not None and failure(alone) is None and first["processes"] == 1
        speed = found["images_per_second"]
        cells += [str(found["batch"]), f"{speed:,.0f}"]
        cells += [f"{speed / alone['images_per_second']:.2f}x" if known else ""]
        if title == "training":
            exchange, waiting = found.get("sums", 0.0) + found.get("all_to_all", 0.0), found.get("waiting", 0.0)
            parts = (found["seconds"], found["seconds"] - exchange - waiting, exchange, waiting)
            cells += [f"{1e3 * part:.2f}" for part in parts]
        lines.append([*cells, *[""] * (9 - len(cells))])
    return lines


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
