"""Predict the scaling to more devices from measurements on one and two devices, with benchmarks.scaling_formulas.

python -m benchmarks.scaling_model                                         from the file in runs/benchmarks
python -m benchmarks.scaling_model --from FOLDER --between 50e9 --node 8   other machines; bytes/s between nodes

Reads devices.json of benchmarks.devices. Prints measured and predicted times side by side, and then predictions for
more devices. Images and rows per device stay the same, so an efficiency of 100 % is linear scaling.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Parser, start, table
from benchmarks.processes import failure
from benchmarks.scaling_formulas import Head, Network, Recipe, Step, View
from common import arguments
from common.errors import UserError, exit_code_of

TINY = {"devices": [1, 2, 8]}


def main(argv: list[str] | None = None) -> None:
    """Print measured and predicted times side by side, and the predictions for more devices."""
    parser = Parser("scaling_model", __doc__, seconds=0, tiny=TINY)
    folder = Path("runs/benchmarks")
    parser.add_argument("--from", dest="folder", type=arguments.path_option, default=folder, help=f"default {folder}")
    parser.add_argument("--between", type=float, default=50e9, help="bytes/s of a device to other nodes (default 50e9)")
    parser.add_argument("--node", type=int, default=8, help="devices per node (default 8)")
    parser.add_argument("--rows", type=int, default=None, help="rows per device (default: half of the measured number)")
    parser.add_argument("--batch", type=int, default=None, help="images per device (default: the measured number)")
    parser.add_numbers("--devices", [1, 2, 8, 64, 512], "numbers of devices")
    options = parser.parse_args(argv)
    start(options)
    rows = read(options.folder / f"devices{'_tiny' if options.tiny else ''}.json")
    parts = [part for of in (_recipe, _head, _extraction) if (part := of(rows, options)) is not None]
    lines = [line for measured, _ in parts for line in measured]
    print(table(["what", "devices", "ms, measured", "ms, predicted", "error"], lines))
    network = f"{options.node} devices per node, {options.between:.3g} bytes/s between nodes"
    print(f"\nPREDICTIONS, {network}")
    for _, predicted in parts:
        print(f"\n{predicted(options.devices)}")


def read(path: Path) -> dict[int, dict]:
    """The results of benchmarks.devices by number of processes. Raises UserError if there are no valid ones."""
    if not path.exists():
        raise UserError(f"{path.parent} has no devices.json to predict from: run benchmarks.devices first")
    try:
        return {row["processes"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by benchmarks.devices: run that again") from error


def _needed(rows: dict[int, dict], *wanted: tuple[int, str]) -> list[dict] | None:
    """These sections for these numbers of processes; None, with a line of output, if one was not measured."""
    found = []
    for number, name in wanted:
        section = rows.get(number, {}).get(name)
        if (why := failure(section)) is not None:
            print(f"left out: {name} on {number} devices: {why}", file=sys.stderr)
            return None
        found.append(section)
    return found


Predicted = Callable[[list[int]], str]
Part = tuple[list[list[str]], Predicted]


def _recipe(rows: dict[int, dict], options: Any) -> Part | None:
    found = _needed(rows, (1, "training"), (1, "half"), (2, "link"))
    if found is None:
        return None
    whole, half, link = found
    sizes = {name: whole[name] for name in ("trained", "gates")}
    recipe = Recipe.fitted(whole["seconds"], half["seconds"], whole["batch"], **sizes)
    network = Network(link["within"], options.between, link["latency"], options.node)
    measured = _measured(
        rows,
        ("training", "each"),
        lambda section: f"default recipe, {section['batch']} images",
        lambda number, section: recipe.step(network, number, section["batch"] // number),
    )
    images = options.batch or whole["batch"]
    title = f"the default recipe, {images} images per device"
    return measured, lambda devices: _growth(title, devices, lambda n: [("", recipe.step(network, n, images))])


def _extraction(rows: dict[int, dict], options: Any) -> Part | None:
    found = _needed(rows, (1, "extraction"), (2, "link"))
    if found is None:
        return None
    alone, link = found
    images = round(alone["seconds"] * alone["images_per_second"])
    view = View(alone["seconds"] / -(-images // alone["batch"]), alone["batch"], alone["bytes"])
    network = Network(link["within"], options.between, link["latency"], options.node)
    measured = _measured(
        rows,
        ("extraction",),
        lambda section: f"extraction, {images:,} images",
        lambda number, section: view.step(network, number, images),
    )
    title = f"extraction, {images:,} images per device"
    return measured, lambda devices: _growth(title, devices, lambda n: [("", view.step(network, n, images * n))])


def _head(rows: dict[int, dict], options: Any) -> Part | None:
    """The head with many experts."""
    found = _needed(rows, (1, "head_half"), (1, "head_half_experts"), (1, "head_quarter"), (2, "head_link"))
    if found is None:
        return None
    *steps, link = found
    sizes = {name: link[name] for name in ("experts", "top_k", "features", "outputs", "common", "each")}
    head = Head.fitted(*(step["seconds"] for step in steps), rows=steps[1]["rows"], **sizes)
    network = Network(link["within"], options.between, link["latency"], options.node)
    measured = _measured(
        rows,
        ("head", "head_each"),
        lambda section: f"{head.experts} experts, {section['rows']:,} rows",
        lambda number, section: head.step(network, number, number, section["rows"] // number),
    )
    each = options.rows or steps[0]["rows"]

    def on(number: int) -> list[tuple[str, Step]]:
        """Variants: experts on all devices of a node, and on as many devices as there are experts."""
        groups = dict.fromkeys(min(number, most) for most in (options.node, head.experts))
        fit = [members for members in groups if number % members == 0]
        return [(f"experts on {members}", head.step(network, number, members, each)) for members in fit]

    title = f"{head.experts} experts, {each:,} rows per device"
    return measured, lambda devices: _growth(title, devices, on)


def _measured(
    rows: dict[int, dict], sections: tuple[str, ...], name: Callable[[dict], str], predict: Callable[[int, dict], Step]
) -> list[list[str]]:
    """The rows of the table: the measured time of each section, and the time that the model predicts."""
    return [
        _compared(name(section), number, section["seconds"], predict(number, section))
        for number, row in sorted(rows.items())
        for section in map(row.get, sections)
        if failure(section) is None
    ]


def _compared(what: str, number: int, seconds: float, step: Step) -> list[str]:
    off = 100 * (step.whole / seconds - 1)
    return [what, str(number), f"{1e3 * seconds:.2f}", f"{1e3 * step.whole:.2f}", f"{off:+.0f} %"]


def _growth(title: str, devices: list[int], steps: Callable[[int], list[tuple[str, Step]]]) -> str:
    """A line per number of devices; the efficiency compares a device with a single one."""
    one = steps(1)[0][1].whole
    lines = []
    for number in devices:
        for name, step in steps(number):
            parts = (step.whole, step.compute, step.all_to_all, step.gates, step.gradients)
            efficiency = 100 * one / step.whole
            stops = "" if step.compute >= step.whole / 2 else "more than half is communication"
            lines.append([number, name, *(f"{1e3 * part:.2f}" for part in parts), f"{efficiency:.0f} %", stops])
    columns = ["devices", title, "ms", "compute", "all-to-all", "gates", "sums and features", "efficiency", ""]
    return table(columns, lines)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
