"""Export a trained run to one file, after checking that it gives the same outputs as the run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import EnvironmentFault, UserError, one_line
from common.files import require_place, write_atomically
from deployment.about import about
from deployment.formats import FORMATS, Answer, Format
from deployment.graph import ImagesToAnswers, in_float32, traced
from evaluation.trained import TrainedRun

BATCHES = (1, 7, 64)
TOLERANCE = 1e-4  # limit for the differences from `compare`


TORCH = (2, 8)  # the oldest version that exports all runs: 2.6 lacks half


def fits_torch() -> bool:
    """Whether this PyTorch is new enough."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= TORCH


@dataclass(frozen=True)
class Checked:
    """The file's size in bytes, and the differences between its outputs and those of the run, from `compare`.

    undecided: the number of images in which a token chose another expert.
    """

    bytes: int
    probabilities: float
    weights: float
    undecided: int


def check_target(out: Path) -> Format:
    """The format given by the ending of a file name.

    Raises UserError for another ending or an unsuitable path, EnvironmentFault if nothing can be written there and
    for missing packages.
    """
    found = FORMATS.get(out.suffix.lower())
    if found is None:
        raise UserError(f"{out} ends in neither .onnx nor .pt2: the ending chooses the format, give one of these")
    if not out.parent.is_dir():
        raise UserError(f"{out}: {out.parent} is not a folder")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file")
    require_place(out, "OUT")
    if not fits_torch():
        needed = ".".join(map(str, TORCH))
        raise EnvironmentFault(
            f"{out} needs the exporter of torch {needed} or later, but this is {torch.__version__}: "
            "pip install --upgrade torch"
        )
    if found.missing:
        names = found.missing
        raise EnvironmentFault(f"{out} needs {', '.join(names)}: pip install {' '.join(names)}, or name a .pt2 file")
    return found


def export(trained: TrainedRun, out: Path) -> Checked:
    """Write a run, on the CPU, to `out`, after a check that the file gives the outputs of the run.

    Raises UserError if the format cannot represent the run, EnvironmentFault if the outputs differ or `out` cannot be
    written; then no file is written.
    """
    chosen, ending = check_target(out), out.suffix.lower()
    trained = in_float32(trained)
    _check_size(trained, chosen, out)
    try:
        content = chosen.encode(traced(trained), about(trained, out.name, ending))
        answer = chosen.opened(content)
    except Exception as error:  # an exporter can raise any exception
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first exception says what is missing; the exporter adds advice
            cause = cause.__cause__
        reason = one_line(f"{type(cause).__name__}: {cause}", 200)
        raise UserError(f"this run cannot be exported as {ending} ({reason}): some of its parts need Python") from error
    checked = compare(answer, trained, len(content))
    if not (checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE):
        raise EnvironmentFault(
            f"{out} would give different outputs than the run: probabilities by up to {checked.probabilities:.1g}, "
            f"weights by {checked.weights:.1g}, more than {TOLERANCE:g}; nothing was written"
        )
    write_atomically(out, lambda temporary: temporary.write_bytes(content))
    return checked


def _check_size(trained: TrainedRun, chosen: Format, out: Path) -> None:
    tensors = (*trained.backbone.parameters(), *trained.model.parameters())
    needed = sum(tensor.numel() for tensor in tensors) * 4
    if chosen.most is not None and needed > chosen.most:
        raise UserError(f"{out} would have {needed / 1e9:.1f} GB, but .onnx files are limited to 2.1: name a .pt2 file")


@torch.no_grad()
def compare(answer: Answer, trained: TrainedRun, size: int) -> Checked:
    """The differences between the outputs of a file and those of the run, for batches of several sizes.

    A token with two almost equal gate values may choose another expert, which changes the weights of its image, and
    its probabilities a little. So weights are compared as their largest difference per image, averaged over the
    images, and probabilities as their largest difference in the images without such a token, or as the mean of all
    images if that is larger.
    """
    graph, probabilities, weights = ImagesToAnswers(trained).eval(), [], []
    for batch in BATCHES:
        images = pictures(batch, trained.config.data.side)
        (mine, *chosen), (given, *found) = graph(images), answer(images)
        probabilities.append((given - mine).abs().amax(dim=1))
        tables = (_table(*pair, len(trained.config.experts.sizes)) for pair in (found, chosen))
        weights.append((next(tables) - next(tables)).abs().flatten(1).amax(dim=1))
    differ_N, moved_N = torch.cat(probabilities), torch.cat(weights)
    alike_N = moved_N <= TOLERANCE
    largest = float(torch.cat([differ_N[alike_N], differ_N.mean()[None]]).amax())
    return Checked(size, largest, float(moved_N.mean()), int((~alike_N).sum()))


def _table(experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """The weight of every expert, (B, E) or (B, L, E), independent of their order in the output."""
    zeros = weights.new_zeros(*weights.shape[:-1], num_experts)
    return zeros.scatter_add(-1, experts.clamp_min(0), weights)


def pictures(count: int, side: int) -> Tensor:
    """Test images, uint8 (B, 3, side, side): smooth colours with noise, the same each time."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    grain = torch.rand(count, 3, side, side, generator=generator) - 0.5
    clouds = F.interpolate(coarse, (side, side), mode="bilinear")
    return (255 * (clouds + 0.3 * grain)).clamp(0, 255).to(torch.uint8)
