"""A training step of the default recipe: images/s, fraction of the speed of matrix products, and where the time goes.

python -m benchmarks.blocks_step                            about a minute on a GPU, with random images and weights
python -m benchmarks.blocks_step --config configs/cifar100_vmoe.yaml
python -m benchmarks.blocks_step --tiny                     a quick trial on a CPU

A step is that of train.py: preparation of uint8 images, forward, losses, backward, optimizer, moving average, with the
blocks compiled and captured as a CUDA graph on a GPU. It is measured with the recipe's share of dropped patches, and
with all patches. FLOPs are those of the matrix products and of attention, forward and backward, as PyTorch counts them.
On a GPU, the kernels of a step are added up by kind, and the largest of each kind are listed by name.
Options that are not listed below go to train.py's configuration.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from assembly.pipeline import build_model, compile_blocks
from benchmarks.common import (
    Parser,
    captured,
    environment,
    header,
    matrix_rate,
    require_finite,
    start,
    table,
    timed,
    write,
)
from common.errors import UserError, exit_code_of, one_line
from config.command_line import parse_command_line
from config.config import Config
from model.backbone import load_backbone
from model.moe_vit import AnyMoE
from training.optim import build_optimizer
from training.step import TrainingStep

CLASSES = 100
PROFILED = 5  # steps
LARGEST = 5  # kernels listed of each kind
NAME = 110  # characters of a kernel's name that are printed
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "fused by the compiler": ("triton",),
    "copies": ("memcpy", "memset"),
}
TINY = ["--config", "configs/digits_blocks.yaml", "--train.batch_size", "16", "--train.patch_dropout", "0.5"]


def main(argv: list[str] | None = None) -> None:
    """Measure the step with dropped patches and with all, print the tables, write the JSON."""
    parser = Parser("blocks_step", __doc__, seconds=10)
    parser.allow_abbrev = False
    options, rest = parser.parse_known_args(argv)
    device = start(options)
    words = [*(TINY if options.tiny else []), *rest, "--backbone.pretrained", "false", "--device", options.device]
    config = parse_command_line(words).config
    if config.experts.place != "blocks":
        raise UserError("the step of a head is measured by benchmarks.step: name a --config with experts.place blocks")
    where, (rate, in_words) = environment(device), matrix_rate(device, options.seconds / 10)
    shares = sorted({config.train.patch_dropout, 0.0}, reverse=True)
    rows = [measure(config, device, share, options.seconds / len(shares)) for share in shares]
    print(header(f"One training step of {config.train.batch_size} images", where))
    print(f"matrix products: {in_words}\n")
    columns = ["dropped patches", "ms per step (range)", "images/s", "GFLOP per image", "of the matrix rate"]
    print(table(columns, [_line(row, config.train.batch_size, rate) for row in rows]))
    for row in rows:
        if row["kernels"]:
            step_name = f"a step with {100 * row['dropped']:g} % of the patches dropped"
            print(f"\nKernels of {step_name}:\n")
            print(table(["kernels", "ms"], [[kind, f"{ms:.2f}"] for kind, ms in row["kernels"].items()]))
            print(f"\nThe largest kernels of each kind in {step_name}:\n")
            print(table(["kind", "ms", "launches", "kernel"], [_kernel_line(kernel) for kernel in row["largest"]]))
    write(options, "blocks_step", where, rate=rate, rows=rows)


def measure(config: Config, device: torch.device, dropped: float, seconds: float) -> dict[str, Any]:
    """Time, FLOPs and kernels of a step that drops this share of the patches."""
    from timm.utils import ModelEmaV3  # here, because importing timm takes seconds

    torch.manual_seed(0)
    train, backbone = config.train, load_backbone(config.backbone, device)
    model: Any = build_model(config, (), CLASSES, backbone).to(device).train()
    images_BCHW = torch.randint(256, (train.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels_B = torch.randint(CLASSES, (train.batch_size,), device=device)
    options = {"patch_dropout": dropped} if dropped else {}
    with FlopCounterMode(display=False) as counter:
        step_of(config, model.on(backbone))(images_BCHW, labels_B, warmup=False, **options)
    compile_blocks(config, model, device)
    step = step_of(config, model)
    run, done = captured(step, train.graph, train.batch_size), 0
    ema = ModelEmaV3(model, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None

    def once() -> None:
        nonlocal done
        run(images_BCHW, labels_B, warmup=False, **options)
        done += 1
        if ema:
            ema.update(model, step=done)

    timing = timed(once, device, seconds, warm=6)
    require_finite(step)
    kernels = kernels_of(once) if device.type == "cuda" else []
    flops = counter.get_total_flops() / train.batch_size
    found = {"dropped": dropped, "timing": timing, "flops": flops}
    return found | {"kernels": by_kind(kernels), "largest": largest(kernels)}


def step_of(config: Config, model: AnyMoE) -> TrainingStep:
    """The training step of a recipe."""
    optimizer, train = build_optimizer(model, config.optim), config.train
    smoothing, clip_norm = train.label_smoothing, config.optim.clip_norm
    return TrainingStep(model, optimizer, config.balance, smoothing, clip_norm, train.precision)


def kernels_of(once: Callable[[], None]) -> list[dict[str, Any]]:
    """The kernels of a step, see `per_step`, profiled over several steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(PROFILED):
            once()
        torch.cuda.synchronize()
    events = profiler.events() or []
    return per_step((event for event in events if event.device_type == torch.autograd.DeviceType.CUDA), PROFILED)


def per_step(events: Iterable[Any], steps: int) -> list[dict[str, Any]]:
    """For each name of the profiler's kernels: kind, milliseconds and launches of a step, most milliseconds first."""
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.time_range.elapsed_us() / 1000 / steps
        launches[event.name] += 1
    return [
        {"kind": kind_of(name), "kernel": name, "ms": ms, "launches": launches[name] / steps}
        for name, ms in times.most_common()
    ]


def by_kind(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, most first; `all` is their sum. Empty without kernels."""
    found: Counter[str] = Counter()
    for kernel in kernels:
        found[kernel["kind"]] += kernel["ms"]
    return dict(found.most_common()) | {"all": sum(found.values())} if found else {}


def largest(kernels: list[dict[str, Any]], count: int = LARGEST) -> list[dict[str, Any]]:
    """The `count` kernels of each kind with the most milliseconds, in the order of `by_kind`."""
    return [
        kernel
        for kind in by_kind(kernels)
        for kernel in [kernel for kernel in kernels if kernel["kind"] == kind][:count]
    ]


def kind_of(kernel: str) -> str:
    """The kind of a kernel, from its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def _kernel_line(kernel: dict[str, Any]) -> list[str]:
    name = kernel["kernel"].removeprefix("void ").replace("at::native::", "")
    return [kernel["kind"], f"{kernel['ms']:.2f}", f"{kernel['launches']:g}", one_line(name, NAME)]


def _line(row: dict[str, Any], batch: int, rate: float) -> list[str]:
    seconds = row["timing"].median
    return [
        f"{100 * row['dropped']:g} %",
        row["timing"].milliseconds(),
        f"{batch / seconds:,.0f}",
        f"{row['flops'] / 1e9:.3g}",
        f"{100 * batch * row['flops'] / seconds / rate:.0f} %",
    ]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
