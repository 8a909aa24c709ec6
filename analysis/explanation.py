"""The picture that explains single answers: the image as the model saw it, its classes, its experts."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots import BLUE, OKABE_ITO


def explanation(
    images_MHWC: Sequence[np.ndarray],
    names: Sequence[str],
    classes: Sequence[Sequence[tuple[str, float]]],
    votes: Sequence[Sequence[tuple[str, float, str, float]]],
) -> Figure:
    """One row an image: pixels, probabilities of the likeliest classes, gate weights of the experts.

    images_MHWC: uint8 RGB. names: of the files. classes: (name, probability), likeliest first. votes: (expert,
    gate weight, class that the expert alone would name, its probability), heaviest first; an expert's label begins
    with its index, which decides its colour.
    """
    bars = max(map(len, [*classes, *votes]))
    rows = len(images_MHWC)
    figure = Figure(figsize=(9, rows * max(1.5, 0.34 + 0.26 * bars) + 0.45), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, 3, squeeze=False, width_ratios=[1, 2, 2])
    for (picture, left, right), image, name, scores, experts in zip(
        grid, images_MHWC, names, classes, votes, strict=True
    ):
        picture.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
        picture.set(xticks=[], yticks=[])
        picture.set_title(_short(name, 24), fontsize=8)
        _bars(left, bars, [(score, BLUE, _short(label, 28), f"{score:.1%}") for label, score in scores])
        _bars(right, bars, [_vote(*vote) for vote in experts])
    grid[0, 1].set_title("class, probability", fontsize=9)
    grid[0, 2].set_title("expert · hidden units, its answer alone, gate weight", fontsize=9)
    return figure


def _vote(label: str, weight: float, alone: str, probability: float) -> tuple[float, str, str, str]:
    number = label.split(" ")[0]
    colour = OKABE_ITO[int(number) % len(OKABE_ITO)] if number.isdigit() else BLUE
    return weight, colour, f"{_short(label, 16)}, alone: {_short(alone, 16)} ({probability:.0%})", f"{weight:.2f}"


def _bars(ax: Axes, room: int, rows: list[tuple[float, str, str, str]]) -> None:
    """Horizontal bars (length 0 to 1, colour), each with a text on it and a value at the right end."""
    ax.set(xlim=(0, 1), ylim=(room - 0.4, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    for row, (length, colour, label, value) in enumerate(rows):
        ax.barh(row, 1, height=0.8, color="0.95")
        ax.barh(row, length, height=0.8, color=colour, alpha=0.45)
        ax.text(0.015, row, label, fontsize=8, va="center")
        ax.text(0.99, row, value, fontsize=8, va="center", ha="right")


def _short(text: str, length: int) -> str:
    """One line of at most so many letters, with no $ that matplotlib would set as mathematics."""
    text = " ".join(text.split())
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")
