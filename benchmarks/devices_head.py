"""The measurements of benchmarks.devices with a head of many experts, in one of several processes."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import synchronise
from benchmarks.processes import exchange_of, link_of, work
from common.distributed import world
from common.errors import exit_code_of
from config.optim import OptimConfig
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.distributed import Share
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from training.expert_parallel import ExpertParallel
from training.optim import build_optimizer
from training.parallel import Shares
from training.step import TrainingStep

CLASSES, TOP_K = 100, 2
NAMES = ("rows", "experts", "units", "features", "steps")
PROFILED = 10  # steps with timed exchanges
BLOCKS = 5  # the median of so many blocks of steps is reported


def main() -> None:
    work(NAMES, SECTIONS)


def build(options: argparse.Namespace, experts: int, device: Any) -> VisionMoE:
    with torch.device(device):
        router = RouterConfig(kind="mixtral", top_k=TOP_K)
        parts = ExpertsConfig(sizes=[[options.units]] * experts)
        model = VisionMoE((options.features,), CLASSES, NeckConfig(), router, parts)
        # The usual initialisation with zeros would send all rows to the same experts.
        nn.init.normal_(model.moe.router.gate.weight, std=options.features**-0.5)
        return model


def to_itself(options: argparse.Namespace, device: torch.device, experts: int, rows: int) -> dict[str, Any]:
    """`measure` in a single process that distributes its experts as several do, and sends all rows to itself."""
    kind = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return measure(options, device, experts, rows, Share(0, (rows,)))
    finally:
        dist.destroy_process_group()


def measure(
    options: argparse.Namespace, device: torch.device, experts: int, rows: int, alone: Share | None = None
) -> dict[str, Any]:
    """Seconds of a step on a batch that the processes share, its parts, and memory.

    `expert_bytes`: weights, gradients and moments of the experts of a process after a step, as allocated; the largest
    of all processes. `peak`: peak GPU memory allocated by PyTorch in a process, in bytes.
    alone: the share of a process that exchanges with itself.
    """
    model = build(options, experts, device)
    optim = OptimConfig(lr=1e-6)  # loads stay even, as random rows have them
    several = world().several or alone is not None
    spread = ExpertParallel(model, world().size, "even", optim, device) if several else None
    model.train()
    optimizer = build_optimizer(model, optim)
    step = TrainingStep(model, optimizer, BalanceConfig(), 0.1, 1.0, "auto", experts=spread)
    share = alone or Shares(world(), 0, device).of(rows)
    here = rows if share is None else share.sizes[share.rank]
    generator = torch.Generator(device).manual_seed(1 + world().rank)
    features_BF = torch.randn(here, options.features, device=device, generator=generator)
    labels_B = torch.randint(CLASSES, (here,), device=device, generator=generator)

    def once() -> None:
        step(features_BF, labels_B, False, share=share)

    for _ in range(3):
        once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = max(1, options.steps // BLOCKS)
    seconds = [_seconds(once, device, steps) for _ in range(BLOCKS)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    of_experts = [*model.moe.experts.parameters(), *step.of_experts]
    load_M = model.moe.usage_E.view(world().size, -1).sum(1).double()  # by process; each has consecutive experts
    found = {
        "rows": rows,
        "seconds": median(max(alike) for alike in zip(*world().gather(seconds), strict=True)),
        "expert_bytes": max(world().gather(held_by_experts(of_experts, optimizer))),
        "peak": max(world().gather(peak)),
        "largest_over_mean": float(load_M.max() / load_M.mean()),
    }
    return found | (exchange_of(once, device, min(PROFILED, options.steps)) if world().several else {})


def _seconds(run: Callable[[], None], device: torch.device, steps: int) -> float:
    """Seconds of one of so many calls in a row, as training makes them; all processes start together."""
    world().wait()
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / steps


def held_by_experts(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages of these weights, their gradients and their moments, each counted once."""
    tensors = []
    for value in parameters:
        state = [entry for entry in optimizer.state.get(value, {}).values() if isinstance(entry, torch.Tensor)]
        tensors += [value, *state] if value.grad is None else [value, value.grad, *state]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def link(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Inputs of the cost model: sizes, bytes per second that a device sends in an all-to-all of the size used in a
    step, and the seconds of an almost empty one."""
    count, size = world().size, options.rows // world().size * TOP_K * (options.features + CLASSES) // 2

    def exchange(numbers: int) -> Callable[[], object]:
        sent = torch.zeros(numbers // count * count, dtype=torch.bfloat16, device=device)
        came = torch.empty_like(sent)
        return lambda: dist.all_to_all_single(came, sent)

    large, small = link_of(exchange, device, size)
    sent = 2 * size * (1 - 1 / count)
    return sizes(options) | {"within": sent / max(large - small, 1e-9), "latency": small}


def sizes(options: argparse.Namespace) -> dict[str, int]:
    """Inputs of the cost model that describe the model."""
    model: nn.Module = build(options, options.experts, "meta")
    of_experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in f".{name}")
    total = sum(value.numel() for value in model.parameters())
    found = {"top_k": TOP_K, "features": options.features, "outputs": CLASSES, "experts": options.experts}
    return found | {"common": total - of_experts, "each": of_experts // options.experts}


SECTIONS = {
    "head": lambda options, device: measure(options, device, options.experts, options.rows),
    "head_each": lambda options, device: measure(options, device, options.experts, options.rows * world().size),
    "head_half": lambda options, device: to_itself(options, device, options.experts // 2, options.rows // 2),
    "head_half_experts": lambda options, device: to_itself(options, device, options.experts // 2, options.rows),
    "head_quarter": lambda options, device: to_itself(options, device, options.experts // 4, options.rows // 2),
    "head_link": link,
}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
