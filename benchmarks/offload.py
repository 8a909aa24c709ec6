"""Savings and costs of experts in host memory: bytes on the device and latency, by the share kept on the device.

python -m benchmarks.offload            half a minute on a GPU
python -m benchmarks.offload --tiny     a quick trial on a CPU

A head of equal experts behind a ViT, top-2, in evaluation mode, on random features that its random gate distributes
unevenly. Usage is counted on a batch, as in training. Each row keeps a share of the experts' bytes on the device.
"""

import copy
import sys

import torch

from benchmarks.common import Parser, environment, header, save, start, table, timed, write
from common.errors import exit_code_of
from features.file import gigabytes
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.offload import Traffic, offload
from model.routers import RouterConfig

SHARES = (None, 1.0, 0.5, 0.25, 0.0)  # None: not offloaded
TINY = {"experts": 4, "hidden": 16, "features": 32, "batches": [1, 8]}
CLASSES = 100


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = Parser("offload", __doc__, seconds=20, tiny=TINY)
    parser.add_argument("--experts", type=int, default=16, help="routed experts (default 16)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden units of each (default 1024)")
    parser.add_argument("--features", type=int, default=12_288, help="features per sample (default 12288)")
    parser.add_numbers("--batches", [1, 32, 256], "batch sizes")
    options = parser.parse_args(argv)
    device = start(options)
    where = environment(device)
    each, whole, rows = options.seconds / len(SHARES) / len(options.batches), build(options), []
    for share in SHARES:
        rows.append(measure(share, whole, options, device, each))
        save(options, "offload", where, rows=rows)
        print(" | ".join(_line(rows[-1])), file=sys.stderr, flush=True)
    said = f"{options.experts} experts of {options.hidden:,} units on {options.features:,} features, top-2, float32"
    print(header(f"Experts in host memory: {said}", where))
    columns = ["kept on the device", "experts kept", "peak memory"]
    columns += [f"ms at batch {batch} (range), bytes copied" for batch in options.batches]
    print(table(columns, [_line(row) for row in rows]))
    write(options, "offload", where, rows=rows)


def build(options) -> VisionMoE:
    """The model on the CPU, with usage counted on a batch."""
    torch.manual_seed(0)
    router = RouterConfig(kind="mixtral", top_k=2, norm="none")
    experts = ExpertsConfig(sizes=[[options.hidden]] * options.experts)
    model = VisionMoE((options.features,), CLASSES, NeckConfig(), router, experts).eval()
    with torch.no_grad():
        model.moe.router.gate.weight.mul_(3)
        model.moe.router.gate.bias.copy_(torch.linspace(2, 0, options.experts))  # the first experts are used most
        routing = model.moe.router(model.neck(torch.randn(512, options.features)))
        model.moe.usage_E.copy_(routing.counts_E)
    return model


def measure(share: float | None, whole: VisionMoE, options, device: torch.device, seconds: float) -> dict:
    """Seconds per batch, bytes copied per batch, and peak device memory, with a share of the experts kept."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = copy.deepcopy(whole)
    size = sum(tensor.nbytes for tensor in model.moe.experts.parameters())
    traffic = Traffic(kept=options.experts) if share is None else offload(model, device, int(share * size))
    model.to(device)
    found = {"share": share, "bytes": size, "kept": traffic.kept, "batches": {}}
    for batch in options.batches:
        found["batches"][batch] = _batch(model, traffic, batch, options.features, device, seconds)
    found["peak"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return found


@torch.no_grad()
def _batch(model: VisionMoE, traffic: Traffic, batch: int, features: int, device: torch.device, seconds: float) -> dict:
    pool = [torch.randn(batch, features, device=device) for _ in range(16)]
    count = iter(range(10**9))
    copied = traffic.copied_bytes
    timing = timed(lambda: model(pool[next(count) % len(pool)]), device, seconds)
    return {"timing": timing, "copied": (traffic.copied_bytes - copied) / next(count)}


def _line(row: dict) -> list[str]:
    share = "all, not offloaded" if row["share"] is None else f"{100 * row['share']:.0f} %"
    cells = [f"{found['timing'].milliseconds()}, {gigabytes(found['copied'])}" for found in row["batches"].values()]
    return [share, str(row["kept"]), "-" if row["peak"] is None else gigabytes(row["peak"]), *cells]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
