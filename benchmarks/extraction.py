"""Images/s through a frozen ViT, from uint8 on the device to pooled features, against the speed of matrix products.

python -m benchmarks.extraction                                       three backbones, about 150 s on a GPU
python -m benchmarks.extraction --modes default max-autotune-no-cudagraphs --seconds 400
python -m benchmarks.extraction --tiny                                a quick trial on a CPU

Weights are random, which does not affect the time. `of the matrix rate` is images/s times the FLOPs of an image,
divided by the speed of a large bfloat16 product (float32 on a CPU) measured in the same run. Compilation is not part of
the time of a batch; it has a separate column. Contestants that do not fit into the time limit are listed.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    Failure,
    Parser,
    attempt,
    environment,
    header,
    matrix_rate,
    start,
    synchronise,
    table,
    timed,
    write,
)
from common.errors import exit_code_of
from evaluation.cost import flops
from features.extraction import Extractor
from model.backbone import Backbone, BackboneConfig, load_backbone
from model.preparation import prepare

BACKBONES = ["vit_base_patch16_clip_quickgelu_224.openai", "vit_small_patch16_224", "vit_large_patch16_224"]
FEATURES = ["cls:-1", "mean:-1"]
TINY = {"backbones": ["test_vit"], "batch": 4, "pixels": 8, "modes": []}


def main(argv: list[str] | None = None) -> None:
    """Measure every contestant on every backbone, print the table, write the JSON."""
    parser = Parser("extraction", __doc__, seconds=150, tiny=TINY)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, help=f"timm ViTs (default {' '.join(BACKBONES)})")
    parser.add_argument("--batch", type=int, default=1024, help="batch size (default 1024)")
    parser.add_argument("--pixels", type=int, default=32, help="side of the input images (default 32)")
    parser.add_argument(
        "--modes", nargs="*", default=["default"], help="modes of torch.compile for our extraction (default: default)"
    )
    options = parser.parse_args(argv)
    device = start(options)
    where = environment(device)
    rate, said = matrix_rate(device, min(2.0, options.seconds / 20))
    print(header(f"Feature extraction, batch {options.batch}; {said}", where), flush=True)
    rows = measure(options, device, rate)
    columns = ["backbone", "contestant", "images/s", "range", "of the matrix rate", "compiled in", "from float32"]
    print(table(columns, [_line(row) for row in rows]))
    for row in rows:
        if "failure" in row:
            print(f"- {row['backbone']}, {row['contestant']}: {row['failure']}")
    write(options, "extraction", where, matrix_rate=rate, batch=options.batch, rows=rows)


def measure(options, device: torch.device, rate: float) -> list[dict]:
    """The contestants in turn, each on every backbone; those with a long compilation come last."""
    deadline = time.perf_counter() + options.seconds
    size = (options.batch, 3, options.pixels, options.pixels)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    loaded = {name: attempt(lambda name=name: _load(name, device)) for name in options.backbones}
    costs = {name: flops(b, _blank(b, device)) for name, b in loaded.items() if isinstance(b, Backbone)}
    exact = {name: attempt(lambda b=b: _reference(b, images)) for name, b in loaded.items()}
    each = options.seconds / (len(loaded) * 24)
    rows = []
    for contestant, make in contestants(options, device):
        for name, backbone in loaded.items():
            row = {"backbone": name, "contestant": contestant}
            rows.append(row)
            if isinstance(backbone, Failure):
                row["failure"] = backbone.reason
                continue
            if "compiled" in contestant and time.perf_counter() > deadline:
                row["failure"] = "no time left: raise --seconds"
                continue
            print(f"{name}, {contestant}", file=sys.stderr, flush=True)
            found = attempt(partial(_measure, make, backbone, images, exact[name], device, each))
            if isinstance(found, Failure):
                row["failure"] = found.reason
            else:
                row |= found | {"share": found["images_per_second"] * costs[name] / rate}
    return sorted(rows, key=lambda row: options.backbones.index(row["backbone"]))


def _measure(make, backbone: Backbone, images: Tensor, exact, device: torch.device, seconds: float) -> dict:
    began = time.perf_counter()
    run = make(backbone, images)
    features = run(images)
    synchronise(device)
    first = time.perf_counter() - began
    timing = timed(lambda: run(images), device, seconds)
    count = len(images)
    found = {"images_per_second": count / timing.median, "low": count / timing.high, "high": count / timing.low}
    found |= {"runs": timing.runs, "first_call_seconds": first}
    if isinstance(exact, Tensor) and features is not None:
        some = features[: len(exact)].float()
        found["from_float32"] = float((some - exact).norm() / exact.norm())
    return found


def _load(name: str, device: torch.device) -> Backbone:
    return load_backbone(BackboneConfig(name=name, pretrained=False, features=FEATURES, precision="float32"), device)


def _blank(backbone: Backbone, device: torch.device) -> Tensor:
    return torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=device)


def _reference(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone(prepare(images[:8], backbone.image_size, backbone.mean, backbone.std))


def contestants(options, device: torch.device) -> list[tuple[str, Callable]]:
    """Name, and a function of a float32 Backbone and the images that gives the function to time."""
    listed = [
        ("timm, float32", partial(plain, dtype=None)),
        ("timm, bfloat16 autocast", partial(plain, dtype=torch.bfloat16)),
        ("resize and normalise only", lambda backbone, images: preparation(backbone)),
        ("ours", ours),
    ]
    if device.type == "cuda":
        listed += [("ours, cuDNN attention", partial(ours, attention="CUDNN_ATTENTION")), ("ours, CUDA graph", graph)]
        listed += [("ours, float16", partial(ours, dtype=torch.float16))]
    listed += [(f"ours, compiled ({mode})", partial(ours, mode=mode)) for mode in options.modes]
    if options.modes:
        listed.append(("timm, bfloat16, compiled", partial(plain, dtype=torch.bfloat16, compiled=True)))
    return listed


def plain(backbone: Backbone, images: Tensor, dtype: torch.dtype | None, compiled: bool = False) -> Callable:
    """timm as in its documentation: interpolate, normalise, `forward_features`."""
    device, vit = images.device.type, backbone.vit
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (backbone.mean, backbone.std))
    forward = torch.compile(vit.forward_features, dynamic=False) if compiled else vit.forward_features
    size = (backbone.image_size,) * 2

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        x_BCHW = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            tokens = forward((x_BCHW - mean) / std)
        patches = tokens[:, vit.num_prefix_tokens :].float()
        return torch.cat([tokens[:, 0].float(), patches.mean(dim=1)], dim=1)

    return run


def preparation(backbone: Backbone) -> Callable:
    """Only the preprocessing before the ViT; returns no features."""

    def run(images: Tensor) -> None:
        prepare(images, backbone.image_size, backbone.mean, backbone.std)

    return run


def ours(backbone: Backbone, images: Tensor, mode=None, attention=None, dtype=torch.bfloat16) -> Callable:
    """The extraction of train.py, compiled for this batch size."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = Backbone(backbone.vit, FEATURES, dtype)
    extractor = Extractor(half, len(images), compiled=mode is not None, mode=mode or "default")

    def run(images: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, attention)) if attention else nullcontext():
            return extractor(images)

    if mode is not None:
        extractor(images)
        if extractor.failed:
            raise RuntimeError(extractor.failed)
    return run


def graph(backbone: Backbone, images: Tensor) -> Callable:
    """The extraction of train.py, captured as a CUDA graph and replayed."""
    run = ours(backbone, images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(images)
    torch.cuda.current_stream().wait_stream(side)
    held, captured = images.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run(held)

    def replay(images: Tensor) -> Tensor:
        held.copy_(images)
        captured.replay()
        return out

    return replay


def _line(row: dict) -> list[str]:
    if "failure" in row:
        return [row["backbone"], row["contestant"], "-", "-", "-", "-", "-"]
    compiled = f"{row['first_call_seconds']:.1f} s" if "compiled" in row["contestant"] else "-"
    error = f"{100 * row['from_float32']:.2f} %" if "from_float32" in row else "-"
    alone = "alone" in row["contestant"]
    return [
        row["backbone"],
        row["contestant"],
        f"{row['images_per_second']:,.0f}",
        f"{row['low']:,.0f}-{row['high']:,.0f}",
        "-" if alone else f"{100 * row['share']:.0f} %",
        compiled,
        error,
    ]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
