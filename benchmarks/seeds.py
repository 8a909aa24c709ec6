"""Is a training step of several seeds faster side by side, or with their heads stacked into batched products?

python -m benchmarks.seeds            about a minute, and less on a GPU
python -m benchmarks.seeds --tiny     a quick trial

A step is forward, backward and AdamW of the recipes' heads, without counters, balance losses and random routing, which
could only slow down the other variants. Every seed has a separate batch, as in train.py --seeds. On a GPU each variant
is one CUDA graph, in bfloat16; side by side, as train.py trains seeds there, the graph has a branch for each seed. On
an H200 side by side is 1.33 to 2.99 times as fast as one after another (docs/options.md).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Parser, environment, header, start, table, timed, write
from common.errors import exit_code_of
from common.text import counted
from training.graph import EAGER_STEPS, Captured, concurrently


@dataclass(frozen=True)
class Head:
    """Features, hidden units of routed and shared experts, classes, samples per step."""

    features: int
    experts: tuple[int, ...]
    shared: tuple[int, ...]
    classes: int
    batch: int


HEADS = {
    "digits.yaml": Head(12_480, (16, 32, 64, 128), (), 10, 128),
    "cifar100_cpu.yaml": Head(384, (128, 256, 512, 1024), (), 100, 512),
    "cifar100_head.yaml": Head(12_288, (64, 128, 256, 512), (2048,), 100, 1024),
}
TINY = {"tiny": Head(32, (4, 8), (16,), 5, 16)}
Weights = dict[str, Tensor]


def main(argv: list[str] | None = None) -> None:
    """Measure the heads, print one table, write the JSON file."""
    parser = Parser("seeds", __doc__, seconds=60)
    parser.add_argument("--seeds", type=int, default=5, help="number of models trained together (default 5)")
    options = parser.parse_args(argv)
    device = start(options)
    where = environment(device)
    threads = "" if device.type == "cuda" else f", {counted(torch.get_num_threads(), 'thread')}"
    print(header(f"A step of {options.seeds} seeds, ms (range){threads}", where), flush=True)
    heads, rows = TINY if options.tiny else HEADS, []
    if device.type == "cpu":  # the largest head is not trained on a CPU
        heads = {name: head for name, head in heads.items() if name != "cifar100_head.yaml"}
    for name, head in heads.items():
        steps = [step_of(head, group, device) for group in ([1] * options.seeds, [options.seeds])]
        names = ["apart", "stacked"]
        if device.type == "cuda":
            steps.append(step_of(head, [1] * options.seeds, device, branches=True))
            names.append("side by side")
        times = [timed(step, device, options.seconds / len(heads) / len(steps)) for step in steps]
        rows.append({"head": name, **dict(zip(names, times, strict=True))})
    cells = [
        [
            head,
            apart.milliseconds(),
            *(f"{t.milliseconds()}, {apart.median / t.median:.2f} times as fast" for t in rest),
        ]
        for head, apart, *rest in (row.values() for row in rows)
    ]
    print(table(["head", "one seed after another", "stacked", "side by side"][: len(cells[0])], cells))
    write(options, "seeds", where, seeds=options.seeds, rows=rows)


def weights_of(head: Head, seeds: int, device: torch.device) -> Weights:
    """Random weights of several heads; the first dimension of each tensor is the seed."""
    sizes = (*head.experts, *head.shared)
    shapes = {"gate": (head.features, len(head.experts))}
    shapes |= {f"in {i}": (head.features, units) for i, units in enumerate(sizes)}
    shapes |= {f"out {i}": (units, head.classes) for i, units in enumerate(sizes)}
    return {name: torch.randn(seeds, *s, device=device) / s[0] ** 0.5 for name, s in shapes.items()}


def logits(head: Head, weights: Weights, x_SBD: Tensor) -> Tensor:
    """Logits (S, B, C) of S heads, each on its own batch: every expert on every sample, two of them weighted."""
    x_SBD = F.layer_norm(x_SBD, x_SBD.shape[-1:])
    gate_SBE = torch.bmm(x_SBD.float(), weights["gate"]).softmax(-1)
    best = gate_SBE.topk(2, dim=-1)
    weight_SBE = torch.zeros_like(gate_SBE).scatter(-1, best.indices, best.values)
    total_SBC = x_SBD.new_zeros(())
    for index in range(len(head.experts) + len(head.shared)):
        out_SBC = torch.bmm(torch.bmm(x_SBD, weights[f"in {index}"]).relu(), weights[f"out {index}"]).float()
        if index < len(head.experts):
            out_SBC = out_SBC * weight_SBE[..., index, None]
        total_SBC = total_SBC + out_SBC
    return total_SBC


def step_of(head: Head, groups: list[int], device: torch.device, branches: bool = False) -> Callable[[], None]:
    """A training step of heads in groups: heads in a group are stacked, groups run one after another, or in branches
    of the graph.
    """
    runs = []
    for seeds in groups:
        weights = {name: value.requires_grad_() for name, value in weights_of(head, seeds, device).items()}
        optimizer = torch.optim.AdamW(list(weights.values()), fused=True, capturable=device.type == "cuda")
        x_SBD = torch.randn(seeds, head.batch, head.features, device=device)
        runs.append((weights, optimizer, x_SBD, torch.randint(head.classes, (seeds * head.batch,), device=device)))

    def train(weights: Weights, optimizer: torch.optim.Optimizer, x_SBD: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_SBC = logits(head, weights, x_SBD)
        (F.cross_entropy(logits_SBC.flatten(0, 1), labels, reduction="sum") / head.batch).backward()
        optimizer.step()

    streams = [torch.cuda.Stream(device) for _ in runs] if branches else []

    def step() -> None:
        if branches:
            concurrently(device, [(stream, partial(train, *run)) for stream, run in zip(streams, runs, strict=True)])
        else:
            for run in runs:
                train(*run)

    return step if device.type == "cpu" else _captured(step, device)


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph. It keeps the step, because the graph does not own the step's tensors."""
    captured = Captured(device)

    def replayed() -> None:
        captured(lambda _: step(), None)

    for _ in range(EAGER_STEPS + 1):
        replayed()
    return replayed


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
