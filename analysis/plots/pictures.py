"""Figures of images: explanations of single predictions, and galleries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from analysis.plots.patches import COLOURS, tinted
from analysis.plots.style import BLUE, Names, expert_colour, new_figure, short


def explanation(
    images_MHWC: Sequence[np.ndarray],
    names: Names,
    classes: Sequence[Sequence[tuple[str, float]]],
    votes: Sequence[Sequence[tuple[str, float, str, float]]],
    shared: bool = False,
    maps: Sequence[Sequence[tuple[str, ArrayLike]]] = (),
) -> Figure:
    """One row per image: pixels, probabilities of the most likely classes, gate weights of the experts, patch maps.

    images_MHWC: uint8 RGB. names: of the files. classes: (name, probability), sorted by decreasing probability. votes:
    (expert, gate weight, class that the expert alone predicts, its probability), sorted by decreasing weight; an
    expert's label starts with its index, which determines its colour. shared: the prediction of an expert alone
    includes the shared experts, which process every image. maps: for each image (block, the expert of each of H x W
    patches), the same number for all; omitted if there are none.
    """
    bars = max(map(len, [*classes, *votes]))
    rows = len(images_MHWC)
    columns = len(maps[0]) if maps else 0
    height, width = max(1.5, 0.34 + 0.26 * bars), 9.0 + 1.5 * columns
    figure = new_figure(rows * height + 0.7, "Predictions and their experts", width)
    grid = figure.subplots(rows, 3 + columns, squeeze=False, width_ratios=[1, 2, 2, *[0.9] * columns])
    for (picture, left, right), image, name, scores, experts in zip(
        grid[:, :3], images_MHWC, names, classes, votes, strict=True
    ):
        _show(picture, image)
        picture.set_title(_name(name, 24), fontsize=8)
        _bars(left, bars, [(score, BLUE, short(label, 28), f"{score:.1%}") for label, score in scores])
        _bars(right, bars, [_vote(" + shared" if shared else ", alone", *vote) for vote in experts])
    for axes, image, row in zip(grid[:, 3:], images_MHWC, maps, strict=False):
        for ax, (block, choice_HW) in zip(axes, row, strict=True):
            ax.imshow(tinted(image, choice_HW, [COLOURS[e % len(COLOURS)] for e in range(1 + int(np.max(choice_HW)))]))
            ax.set(xticks=[], yticks=[])
            ax.set_title(block, fontsize=9)
    grid[0, 1].set_title("class, probability", fontsize=9)
    grid[0, 2].set_title(
        f"expert · hidden units, its prediction {'+ shared' if shared else 'alone'}, gate weight", fontsize=9
    )
    return figure


def gallery(
    images_MHWC: Sequence[np.ndarray], captions: Names, title: str, columns: int = 8, rows: Names = ()
) -> Figure:
    """Images in rows of `columns`, with a caption of one or more lines above each.

    rows: a label to the left of each row; a label that starts with an expert's index has the expert's colour.
    """
    columns = max(1, min(columns, len(images_MHWC)))
    count = max(1, -(-len(images_MHWC) // columns))
    lines = max([1, *(caption.count("\n") + 1 for caption in captions)])
    width = min(1.25 * columns + 0.6, 10.5)
    letters = int((width - 0.6) / columns * 72 / 3.9)  # number that fits above an image
    figure = new_figure(count * ((width - 0.6) / columns + 0.14 * lines) + 0.4, title, width)
    grid = figure.subplots(count, columns, squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, image, caption in zip(grid.flat, images_MHWC, captions, strict=False):
        _show(ax, image)
        ax.set_title("\n".join(short(line, letters) for line in caption.split("\n")), fontsize=7, pad=2)
    for ax, label in zip(grid[:, 0], rows, strict=False):
        ax.set_ylabel(short(label, 20), fontsize=8, color=_colour(label))
    return figure


def _show(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
    ax.set(xticks=[], yticks=[])


def _colour(label: str) -> str:
    number = label.split(" ")[0]
    return expert_colour(int(number)) if number.isdigit() else BLUE


def _vote(suffix: str, label: str, weight: float, alone: str, probability: float) -> tuple[float, str, str, str]:
    text = f"{short(label, 16)}{suffix}: {short(alone, 16)} ({probability:.0%})"
    return weight, _colour(label), text, f"{weight:.2f}"


def _bars(ax: Axes, room: int, rows: list[tuple[float, str, str, str]]) -> None:
    """Horizontal bars (length 0 to 1, colour), each with a text on it and a value at the right end."""
    ax.set(xlim=(0, 1), ylim=(room - 0.4, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    for row, (length, colour, label, value) in enumerate(rows):
        ax.barh(row, 1, height=0.8, color="0.95")
        ax.barh(row, length, height=0.8, color=colour, alpha=0.45)
        ax.text(0.015, row, label, fontsize=8, va="center")
        ax.text(0.99, row, value, fontsize=8, va="center", ha="right")


def _name(file: str, length: int) -> str:
    """A file name, unchanged except that a long one is shortened before its ending."""
    text = file if len(file) <= length else f"{file[: length - 7]}…{file[-6:]}"
    return text.replace("$", r"\$")
