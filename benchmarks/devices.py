"""One run on one GPU and on several of the same machine: images a second in training and extraction, and a step's time.

python -m benchmarks.devices                          on 1 and 2 GPUs, about 5 min
python -m benchmarks.devices --processes 1 2 4        on more
python -m benchmarks.devices --tiny                   a quick trial with gloo on a CPU

Each number of processes is started anew by torchrun. Training: the default recipe as train.py trains it, on random
images and a ViT of random weights, which changes no time; of its epochs the first, which compiles, is left out.
Extraction: views of the recipe with experts behind the ViT, written to a file. A step's time is split in another
measurement, without CUDA graphs, where each exchange between the processes first waits for the last of them: what that
takes is `waiting`, the exchange after it `exchange`, all else `compute`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Parser, environment, header, start, table, write
from common.errors import EnvironmentFault, exit_code_of

ROOT = Path(__file__).resolve().parent.parent
TINY = {"images": 96, "epochs": 3, "steps": 4, "views": 2}


def main(argv: list[str] | None = None) -> None:
    """Measure every number of processes, print the table, write the JSON."""
    parser = Parser("devices", __doc__, seconds=300, tiny=TINY)
    parser.add_numbers("--processes", [1, 2], "numbers of processes, each with a GPU of its own")
    parser.add_argument("--images", type=int, default=20_000, help="training images (default 20000)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs, of which the first is not counted (default 4)")
    parser.add_argument("--steps", type=int, default=40, help="steps whose time is split (default 40)")
    parser.add_argument("--views", type=int, default=3, help="views, of which the first is not counted (default 3)")
    options = parser.parse_args(argv)
    where = environment(start(options))
    rows = [measure(number, options) for number in options.processes]
    print(header("The default recipe, each process with a device of its own", where))
    columns = ["processes", "training images/s", "against one", "extraction images/s", "against one"]
    columns += ["ms a step", "compute", "exchange", "waiting"]
    print(table(columns, [_line(row, rows[0]) for row in rows]))
    write(options, "devices", where, images=options.images, rows=rows)


def measure(number: int, options) -> dict:
    """What benchmarks.devices_worker finds with so many processes. Raises EnvironmentFault where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        words += ["-m", "benchmarks.devices_worker", "--out", str(out), "--device", options.device]
        for name in ("images", "epochs", "steps", "views"):
            words += [f"--{name}", str(getattr(options, name))]
        words += ["--tiny"] if options.tiny else []
        variables = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        ran = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )
        if not out.exists():
            said = [line for line in ran.stderr.splitlines() if line.startswith("error")] or [ran.stderr[-300:]]
            raise EnvironmentFault(f"{number} processes: {said[0]}")
        return {"processes": number} | json.loads(out.read_text(encoding="utf-8"))


def _line(row: dict, first: dict) -> list[str]:
    """The cells of a row; `first` is what speed is compared with."""
    cells = [str(row["processes"])]
    for name in ("training", "extraction"):
        cells += [f"{row[name]:,.0f}", f"{row[name] / first[name]:.2f}x"]
    split = row["step"]
    shares = [f"{100 * split[name] / split['whole']:.1f} %" for name in ("compute", "exchange", "waiting")]
    return [*cells, f"{1e3 * split['whole']:.2f}", *shares]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
