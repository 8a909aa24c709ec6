"""A trained run as one file, written once it answers as the run does."""

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
TOLERANCE = 1e-4  # of probabilities in any image, and of weights in the mean image


TORCH = (2, 8)  # the oldest version that exports all runs: 2.6 lacks half


def fits_torch() -> bool:
    """Whether this PyTorch is new enough."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= TORCH


@dataclass(frozen=True)
class Checked:
    """The file's size in bytes, and the largest differences of its answers from the run's."""

    bytes: int
    probabilities: float
    weights: float


def check_target(out: Path) -> Format:
    """The format that a file's name asks for.

    Raises UserError for another ending or what is no place for a file, EnvironmentFault where nothing can be
    written, and for packages that are missing.
    """
    found = FORMATS.get(out.suffix.lower())
    if found is None:
        raise UserError(f"{out} ends in neither .onnx nor .pt2: give it one of these endings, which says the format")
    if not out.parent.is_dir():
        raise UserError(f"{out}: {out.parent} is not a folder")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file")
    require_place(out, "OUT")
    if not fits_torch():
        needed = ".".join(map(str, TORCH))
        raise EnvironmentFault(
            f"{out} needs the exporter of torch {needed} or later, and this is {torch.__version__}: "
            "pip install --upgrade torch"
        )
    if found.missing:
        names = found.missing
        raise EnvironmentFault(f"{out} needs {', '.join(names)}: pip install {' '.join(names)}, or name a .pt2 file")
    return found


def export(trained: TrainedRun, out: Path) -> Checked:
    """Write a run, on the CPU, as `out`, after a check that the file gives the run's answers.

    Raises UserError for what the format cannot hold, EnvironmentFault where the answers differ or `out` cannot be
    written; then nothing is.
    """
    chosen, ending = check_target(out), out.suffix.lower()
    trained = in_float32(trained)
    _check_size(trained, chosen, out)
    try:
        content = chosen.encode(traced(trained), about(trained, out.name, ending))
        answer = chosen.opened(content)
    except Exception as error:  # an exporter fails in every way there is
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"this run cannot be exported as {ending} ({reason}): some of its parts go on in Python"
        ) from error
    checked = compare(answer, trained, len(content))
    if not (checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE):
        raise EnvironmentFault(
            f"{out} would answer differently from the run: probabilities by up to {checked.probabilities:.1g}, weights "
            f"by {checked.weights:.1g}, more than {TOLERANCE:g}; nothing was written"
        )
    write_atomically(out, lambda temporary: temporary.write_bytes(content))
    return checked


def _check_size(trained: TrainedRun, chosen: Format, out: Path) -> None:
    tensors = (*trained.backbone.parameters(), *trained.model.parameters())
    needed = sum(tensor.numel() for tensor in tensors) * 4
    if chosen.most is not None and needed > chosen.most:
        raise UserError(f"{out} would hold {needed / 1e9:.1f} GB, and an .onnx file less than 2.1: name a .pt2 file")


@torch.no_grad()
def compare(answer: Answer, trained: TrainedRun, size: int) -> Checked:
    """How far the answers of a file are from those of the run, at batches of several sizes.

    Probabilities: the largest difference of all. Weights: the largest of an image, as a mean over all images, since
    a token whose gate is undecided to the last bit may choose otherwise.
    """
    graph, probabilities, weights = ImagesToAnswers(trained).eval(), [], []
    for batch in BATCHES:
        images = pictures(batch, trained.config.data.side)
        (mine, *chosen), (given, *found) = graph(images), answer(images)
        probabilities.append((given - mine).abs().amax())
        tables = (_table(*pair, len(trained.config.experts.sizes)) for pair in (found, chosen))
        weights.append((next(tables) - next(tables)).abs().flatten(1).amax(dim=1))
    return Checked(size, float(torch.stack(probabilities).amax()), float(torch.cat(weights).mean()))


def _table(experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """The weight of every expert, (B, E) or (B, L, E), whatever the order they are told in."""
    zeros = weights.new_zeros(*weights.shape[:-1], num_experts)
    return zeros.scatter_add(-1, experts.clamp_min(0), weights)


def pictures(count: int, side: int) -> Tensor:
    """Images to check with, uint8 (B, 3, side, side): coloured clouds with grain, the same each time."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    grain = torch.rand(count, 3, side, side, generator=generator) - 0.5
    clouds = F.interpolate(coarse, (side, side), mode="bilinear")
    return (255 * (clouds + 0.3 * grain)).clamp(0, 255).to(torch.uint8)
