"""How the cost of training a head grows with samples, experts and features, and what limits it.

python -m benchmarks.scaling            about 90 s on a GPU
python -m benchmarks.scaling --tiny     a quick trial on a CPU

A step is forward, backward, clipping and AdamW of the default kind of head on stored float16 features, bfloat16 on a
GPU, as a CUDA graph if train.py would capture one; samples are repeated to get larger sets. The limit is the largest of
three parts of a step: its matrix products (of all experts in dense dispatch) at the measured speed of matrix products,
the traffic of weights, gradients and optimizer state at the measured memory bandwidth, and the rest: launches, waiting
in dispatch, norms and activations.
"""

import sys
import time

import torch

from benchmarks.common import (
    Failure,
    Parser,
    attempt,
    environment,
    header,
    matrix_rate,
    memory_rate,
    start,
    table,
    timed,
    write,
)
from benchmarks.step import on_batches, step_of
from common.errors import UserError, exit_code_of
from evaluation.cost import parameters
from features.file import gigabytes
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.dispatch import choose
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from training.graph import worth_capturing

SIZES = (256, 512, 1024, 2048)  # hidden units, repeated for more experts
CLASSES = 100
TINY = {"samples": [200, 400], "experts": [4, 8], "features": [32, 64], "batch": 64}
# Bytes of a weight in a step: cast to bfloat16 (6), its gradient written in it and cast back (8), clipped (12),
# AdamW's four reads and three writes (28).
TRAFFIC = 54


def main(argv: list[str] | None = None) -> None:
    """Measure the three sweeps, print one table, write the JSON file."""
    parser = Parser("scaling", __doc__, seconds=90, tiny=TINY)
    parser.add_argument("--batch", type=int, default=1024, help="samples per step (default 1024)")
    others = "the first while the other two vary"
    parser.add_numbers("--samples", [10_000, 100_000, 1_000_000], f"stored samples; {others}")
    parser.add_numbers("--experts", [4, 16, 64, 256], f"experts of the head; {others}")
    parser.add_numbers("--features", [1536, 4608, 36_864, 151_296], f"features per sample; {others}")
    options = parser.parse_args(argv)
    if options.batch > min(options.samples):
        raise UserError(f"--batch {options.batch} is larger than the {min(options.samples)} of --samples: lower it")
    device = start(options)
    where = environment(device)
    (matrices, said), memory = matrix_rate(device, 1.0), memory_rate(device)
    print(header(f"Training a head, batch {options.batch}; {said}, {memory / 1e12:.3g} TB/s", where), flush=True)
    cells = sweeps(options)
    each = options.seconds / len(cells) / 4
    rows = []
    for sweep, samples, experts, features in cells:
        print(f"{samples:,} samples, {experts} experts, {features:,} features", file=sys.stderr, flush=True)
        row = {"sweep": sweep, "samples": samples, "experts": experts, "features": features}
        run = attempt(lambda cell=(samples, experts, features): measure(*cell, options, device, each))
        rows.append(row | ({"failure": run.reason} if isinstance(run, Failure) else limits(run, matrices, memory)))
    columns = [
        "samples",
        "experts",
        "features",
        "ms per step (range), dispatch",
        "s per epoch",
        "stored",
        "peak memory",
        "limit",
    ]
    print(table(columns, [_line(row) for row in rows]))
    write(options, "scaling", where, matrix_rate=matrices, memory_rate=memory, batch=options.batch, rows=rows)


def sweeps(options) -> list[tuple[str, int, int, int]]:
    """(sweep, samples, experts, features): each of the three grows while the others stay fixed."""
    samples, experts, features = options.samples[0], options.experts[0], options.features[0]
    cells = [("samples", n, experts, features) for n in options.samples]
    cells += [("experts", samples, n, features) for n in options.experts[1:]]
    return cells + [("features", samples, experts, n) for n in options.features[1:]]


def measure(samples: int, experts: int, features: int, options, device: torch.device, seconds: float) -> dict:
    """Seconds per step over random batches of stored features, and peak memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    once = torch.randn(min(samples, 10_000), features, device=device, dtype=torch.float16)
    stored_NF = once.repeat(-(-samples // len(once)), 1)[:samples]
    labels_N = torch.randint(CLASSES, (samples,), device=device)
    sizes = [[SIZES[e % len(SIZES)] if not options.tiny else 8] for e in range(experts)]
    with torch.device(device):
        router, pooled = RouterConfig(top_k=2), NeckConfig()
        model = VisionMoE((features,), CLASSES, pooled, router, ExpertsConfig(sizes=sizes)).train()
    captured = worth_capturing("auto", model, options.batch)
    train = step_of(model, BalanceConfig(), options.batch, captured)
    timing = timed(on_batches(train, stored_NF, labels_N, options.batch), device, seconds, warm=4, most=300)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    per_expert = sum(parameters(expert) for expert in model.moe.experts) / experts
    # The input of dispatch: features in autocast's number format.
    number_format = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_BD = torch.empty(1, features, device=device, dtype=number_format).expand(options.batch, -1)
    way = choose(2 * options.batch, model.moe.experts, x_BD, static=captured)
    used = parameters(model) - (0 if way == "dense" else per_expert * (experts - 2))
    return {
        "timing": timing,
        "epoch_seconds": timing.median * samples / options.batch,
        "stored_bytes": stored_NF.nbytes,
        "peak_bytes": peak,
        "parameters": parameters(model),
        "flops": 6 * used * options.batch,
        "dispatch": way,
        "graph": captured,
        "seconds": time.perf_counter() - began,
    }


def limits(run: dict, matrices: float, memory: float) -> dict:
    """The three parts of a step in seconds, and the name of the largest."""
    parts = {
        "matrix products": run["flops"] / matrices,
        "memory traffic of the weights": TRAFFIC * run["parameters"] / memory,
    }
    parts["launches and the rest"] = max(0.0, run["timing"].median - sum(parts.values()))
    return run | {"parts": parts, "limit": max(parts, key=parts.get)}


def _line(row: dict) -> list[str]:
    sizes = [f"{row[name]:,}" for name in ("samples", "experts", "features")]
    if "failure" in row:
        return [*sizes, "-", "-", "-", "-", row["failure"]]
    peak = "-" if row["peak_bytes"] is None else gigabytes(row["peak_bytes"])
    share = row["parts"][row["limit"]] / sum(row["parts"].values())
    return [
        *sizes,
        f"{row['timing'].milliseconds()}, {row['dispatch']}" + (", graph" if row["graph"] else ""),
        f"{row['epoch_seconds']:.3g}",
        gigabytes(row["stored_bytes"]),
        peak,
        f"{row['limit']} ({100 * share:.0f} %)",
    ]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
