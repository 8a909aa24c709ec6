"""Forward and backward pass of a mixture-of-experts layer, ours against others, by batch, experts, k and sizes.

python -m benchmarks.dispatch                    the whole grid, about 150 s on a data-centre GPU
python -m benchmarks.dispatch --tiny             a quick trial on a CPU

Other libraries are included if they are installed: pip install mixture-of-experts st-moe-pytorch transformers. On a GPU
all run under bfloat16 autocast with float32 weights. `limit` is the time that the FLOPs of the chosen experts take,
forward and backward, at the speed of a large matrix product measured in the same run.
"""

import itertools
import sys

import torch

from benchmarks.common import (
    Failure,
    Parser,
    Timing,
    attempt,
    environment,
    header,
    matrix_rate,
    start,
    table,
    timed,
    write,
)
from benchmarks.layers import GRAPH, Shape, contestants, ours
from common.errors import exit_code_of

TINY = {"features": 32, "hidden": 16, "classes": 10, "batch": [16, 64], "experts": [4, 8], "top_k": [1, 2]}
UNEQUAL = (0.25, 0.5, 1.0, 2.25)  # times the hidden units of equal experts: the mean is 1


def main(argv: list[str] | None = None) -> None:
    """Measure the grid, print the table and the goals, write the JSON."""
    parser = Parser("dispatch", __doc__, seconds=150, tiny=TINY)
    parser.add_argument("--features", type=int, default=4608, help="features per sample (default 4608)")
    parser.add_argument(
        "--hidden", type=int, default=2048, help="average number of hidden units of an expert (default 2048)"
    )
    parser.add_argument("--classes", type=int, default=100, help="outputs of an expert (default 100)")
    parser.add_numbers("--batch", [256, 1024, 4096, 16384, 65536], "batch sizes, each in turn")
    parser.add_numbers("--experts", [4, 16, 64], "numbers of experts, each in turn")
    parser.add_numbers("--top-k", [1, 2, 4], "experts per sample, each in turn")
    options = parser.parse_args(argv)
    device = start(options)
    where = environment(device)
    rate, said = matrix_rate(device, min(2.0, options.seconds / 20))
    print(header(f"MoE layer, forward + backward, median ms (range); {said}", where))
    print(f"{options.features} features, {options.hidden} hidden units on average, {options.classes} classes\n")
    agreement = attempt(lambda: agree(options, device))
    said = agreement.reason if isinstance(agreement, Failure) else f"{max(agreement.values()):.1e}"
    print(f"largest relative difference of any gradient between the three modes: {said}\n", flush=True)
    rows = measure(options, device, rate)
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))
    print(table(["experts", "k", "batch", "limit ms", "% of limit", *names], [_line(row, names) for row in rows]))
    notes = {(name, v.reason) for row in rows for name, v in row["contestants"].items() if isinstance(v, Failure)}
    print("\n" + "\n".join(f"- {name}: {reason}" for name, reason in sorted(notes)))
    reached = goals(rows)
    print("\n".join(reached))
    write(options, "dispatch", where, matrix_rate=rate, agreement=agreement, rows=rows, goals=reached)


def measure(options, device: torch.device, rate: float) -> list[dict]:
    """Every cell of the grid; the layers of a shape are built once for all batch sizes."""
    shapes = [
        (kind, _shape(options, kind, experts, top_k))
        for kind, experts, top_k in itertools.product(("equal", "unequal"), options.experts, options.top_k)
        if top_k <= experts
    ]
    each = options.seconds / (len(shapes) * len(options.batch) * 22)
    rows = []
    for kind, shape in shapes:
        layers = [(name, attempt(make)) for name, make in contestants(shape, device)]
        for batch in options.batch:
            results = {name: _time(name, layer, shape, batch, device, each) for name, layer in layers}
            flops = active_flops(shape, batch)
            label = f"{len(shape.hidden)} {kind}"
            rows.append({"experts": label, "k": shape.top_k, "batch": batch, "limit": flops / rate})
            rows[-1]["contestants"] = results
            print(f"{label}, k {shape.top_k}, batch {batch}", file=sys.stderr, flush=True)
        del layers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _shape(options, kind: str, experts: int, top_k: int) -> Shape:
    scale = [1.0] if kind == "equal" else UNEQUAL
    hidden = (
        max(8, 8 * round(options.hidden * part / 8)) for part in itertools.islice(itertools.cycle(scale), experts)
    )
    return Shape(options.features, tuple(hidden), options.classes, top_k)


def active_flops(shape: Shape, batch: int) -> float:
    """FLOPs of the chosen experts' matrix products under an even load; the backward pass is twice the forward."""
    mean = sum(shape.hidden) / len(shape.hidden)
    return 3 * 2 * batch * shape.top_k * mean * (shape.features + shape.classes)


def _time(name: str, layer, shape: Shape, batch: int, device: torch.device, seconds: float) -> Timing | Failure:
    if isinstance(layer, Failure):
        return layer
    module, forward = layer
    x_BD = torch.randn(batch, shape.features, device=device, requires_grad=True)
    run = _step(module, forward, x_BD)
    if name == GRAPH:
        result = attempt(lambda: timed(_captured(run, module, x_BD), device, seconds))
    else:
        result = attempt(lambda: timed(run, device, seconds))
    module.zero_grad(set_to_none=True)
    return result


def _step(module, forward, x_BD: torch.Tensor):
    device = x_BD.device.type

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x_BD.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = forward(x_BD)
        out.float().square().mean().backward()

    return run


def _captured(run, module, x_BD: torch.Tensor):
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    module.zero_grad(set_to_none=True)
    x_BD.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def agree(options, device: torch.device) -> dict[str, float]:
    """Norm of the difference between the gradients of grouped or dense and those of sorted, relative to their norm."""
    found = {}
    for kind in ("equal", "unequal"):
        with torch.device(device):
            layer = ours(_shape(options, kind, 4, 2)).eval()
        x_BD = torch.randn(200, options.features, device=device, requires_grad=True)
        run, gradients = _step(layer, lambda x_BD, layer=layer: layer(x_BD)[0], x_BD), {}
        for mode in ("sorted", "grouped", "dense"):
            layer.dispatch_mode = mode
            run()
            parts = [x_BD.grad, *(p.grad for p in layer.experts.parameters())]
            gradients[mode] = [part.float().clone() for part in parts]
        for mode in ("grouped", "dense"):
            pairs = zip(gradients[mode], gradients["sorted"], strict=True)
            found[f"{kind} {mode}"] = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
    return found


def _line(row: dict, names: list[str]) -> list[str]:
    def show(value) -> str:
        return "-" if value is None or isinstance(value, Failure) else value.milliseconds()

    best = _best(row)
    share = "-" if best is None else f"{100 * row['limit'] / best:.0f} %"
    shown = [show(row["contestants"].get(name)) for name in names]
    return [row["experts"], str(row["k"]), str(row["batch"]), f"{1e3 * row['limit']:.3g}", share, *shown]


def _best(row: dict, ours_only: bool = True) -> float | None:
    """Seconds of our automatic mode, eager or as a graph, or of the fastest other layer."""
    mine = ("ours: auto", GRAPH)
    times = [
        value.median
        for name, value in row["contestants"].items()
        if isinstance(value, Timing) and ((name in mine) if ours_only else not name.startswith("ours"))
    ]
    return min(times, default=None)


def goals(rows: list[dict]) -> list[str]:
    """The two summary lines of the table."""
    counted = [row for row in rows if row["batch"] >= 1024 and _best(row) and _best(row, False)]
    lost = [row for row in counted if _best(row) > _best(row, False)]
    where = "; ".join(f"{row['experts']}, k {row['k']}, batch {row['batch']}" for row in lost)
    lines = [f"fastest in {len(counted) - len(lost)} of {len(counted)} cells with 1,024 samples or more"]
    lines[0] += f"; not for {where}" if lost else ""
    largest = max(row["batch"] for row in rows)
    for row in rows:
        if row["batch"] == largest and _best(row):
            share = 100 * row["limit"] / _best(row)
            lines.append(f"{share:.0f} % of the limit at batch {largest}, {row['experts']} experts, k {row['k']}")
    return lines


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
