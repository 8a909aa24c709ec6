"""What a training step with experts on N devices takes, from a few measured inputs: a cost model, and its predictions.

python -m benchmarks.scaling_model runs/benchmarks/expert_parallel.json      with the inputs that were measured there
python -m benchmarks.scaling_model FILE --between 50e9 --node 8 --rows 32768  other machines; bytes/s between nodes

A step of N devices with experts on groups of M takes, with R rows of k assignments a device, D features, C outputs:

    compute     base + expert * E / M + row * R           the three from steps on one device, without any exchange
    all-to-all  2 * R * k * (D + C) * 2 bytes             there and back, forward and backward, in 16 bits;
                * (1 - 1 / M) / bandwidth + 5 * latency   of M devices one holds its own part
    gates       R * N * E * 4 bytes / bandwidth           every process sees the gate of the whole batch
    gradients   2 * 4 bytes * common * (N - 1) / N / bandwidth + 4 * latency, and of the experts over N / M groups

Where N is more than the devices of a node, what crosses it goes at the bandwidth between nodes. Rows a device stay as
they are, so that 1 is even growth. Nothing overlaps in the model, and loads are even: both are told apart by measuring.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Parser, start, table
from common.errors import UserError, exit_code_of

ALL_TO_ALLS = 5  # of a mixture in a step: how many rows come, rows and outputs, and their gradients
OTHERS = 4  # gates, their sums, gradients, the norm of those of experts
TINY = {"devices": [1, 2, 8]}


@dataclass(frozen=True)
class Inputs:
    """What the model starts from. Seconds: base of a step, expert of one expert held, row of one row.

    within, between: bytes a second of a device to others of its node, and to other nodes. latency: seconds of an
    all-to-all of next to nothing. common: parameters that every process has; each: those of one expert.
    """

    base: float
    expert: float
    row: float
    within: float
    between: float
    latency: float
    experts: int
    top_k: int
    features: int
    outputs: int
    common: int
    each: int
    node: int = 8

    @classmethod
    def fitted(cls, whole: float, half_rows: float, half: float, rows: int, experts: int, **others) -> "Inputs":
        """From the seconds of three steps on one device: all, half of the rows, half of the rows and of the experts.

        base + expert * E + row * R = whole, and so on. What noise makes negative is 0.
        """
        row = max(0.0, (whole - half_rows) / (rows / 2))
        expert = max(0.0, (half_rows - half) / (experts / 2))
        base = max(0.0, half - expert * experts / 2 - row * rows / 2)
        return cls(base, expert, row, experts=experts, **others)


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step."""

    compute: float
    all_to_all: float
    gates: float
    gradients: float

    @property
    def whole(self) -> float:
        return self.compute + self.all_to_all + self.gates + self.gradients


def predict(given: Inputs, devices: int, members: int, rows: int) -> Step:
    """A step of so many devices, with experts on groups of `members`, and rows on each device."""

    def bandwidth(span: int) -> float:
        """Of a device in a group of this many in a row: what crosses the node is the slower."""
        outside = max(0, span - given.node) / max(1, span - 1)
        return 1 / ((1 - outside) / given.within + outside / given.between)

    sent = 2 * rows * given.top_k * (given.features + given.outputs) * 2 * (1 - 1 / members)
    several = devices > 1
    reduced = 2 * 4 * given.common * (devices - 1) / devices
    copies = devices // members
    reduced_experts = 2 * 4 * given.each * given.experts / members * (copies - 1) / copies
    return Step(
        compute=given.base + given.expert * given.experts / members + given.row * rows,
        all_to_all=sent / bandwidth(members) + ALL_TO_ALLS * given.latency * (members > 1),
        gates=rows * devices * given.experts * 4 / bandwidth(devices) * several,
        gradients=(reduced + reduced_experts) / bandwidth(devices) + OTHERS * given.latency * several,
    )


def main(argv: list[str] | None = None) -> None:
    """Print what was measured beside what is predicted, and the predictions for more devices."""
    parser = Parser("scaling_model", __doc__, seconds=0, tiny=TINY)
    parser.add_argument("measured", nargs="?", type=Path, default=Path("runs/benchmarks/expert_parallel.json"))
    parser.add_argument("--between", type=float, default=50e9, help="bytes/s of a device to other nodes (default 50e9)")
    parser.add_argument("--node", type=int, default=8, help="devices of a node (default 8)")
    parser.add_argument("--rows", type=int, default=None, help="rows a device (default: half of those measured)")
    parser.add_numbers("--devices", [1, 2, 8, 64, 512], "numbers of devices")
    options = parser.parse_args(argv)
    start(options)
    found = read(options.measured)
    given = Inputs(**{**found["inputs"], "between": options.between, "node": options.node})
    print(compared(found, given))
    rows = options.rows or found["rows"] // 2
    print(
        f"\nPREDICTIONS, {rows:,} rows a device, {options.node} devices a node, {options.between:.3g} bytes/s between\n"
    )
    print(predictions(given, options.devices, rows))


def read(path: Path) -> dict:
    """What benchmarks.expert_parallel has written. Raises UserError where it has not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        Inputs(**found["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what benchmarks.expert_parallel writes: run that first") from error
    return found


def compared(found: dict, given: Inputs) -> str:
    """Measured and predicted steps of the processes that were measured, which share the rows of one."""
    rows = []
    for row in found["steps"]:
        number = row["processes"]
        step = predict(given, number, number, found["rows"] // number)
        off = 100 * (step.whole / row["seconds"] - 1)
        rows.append([number, f"{1e3 * row['seconds']:.2f}", f"{1e3 * step.whole:.2f}", f"{off:+.0f} %"])
    return table(["devices", "ms a step, measured", "predicted", "off by"], rows)


def predictions(given: Inputs, devices: list[int], rows: int) -> str:
    """A line a number of devices: experts on all of a node, and on all devices there are experts for."""
    one = predict(given, 1, 1, rows).whole
    lines = []
    for number in devices:
        for members in dict.fromkeys(min(number, most) for most in (given.node, given.experts)):
            if number % members or members > given.experts:
                continue
            step = predict(given, number, members, rows)
            cells = [f"{1e3 * part:.2f}" for part in (step.compute, step.all_to_all, step.gates, step.gradients)]
            efficiency = 100 * one / step.whole
            stops = "" if efficiency >= 50 else "more than half is exchange"
            lines.append([number, members, f"{1e3 * step.whole:.2f}", *cells, f"{efficiency:.0f} %", stops])
    columns = ["devices", "with experts", "ms a step", "compute", "all-to-all", "gates", "gradients"]
    return table([*columns, "of even growth", ""], lines)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
