"""The registry of figures, their data, and how they are written."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis import plots
from analysis.plots.fonts import undrawable
from common.errors import EnvironmentFault, one_line, warn
from config.config import Config
from data.image_set import ImageSet
from evaluation.block_routing import BlockRouting
from evaluation.predictions import Predictions
from features.bank import FeatureBank
from features.images import ImageBank
from model.moe_vit import AnyMoE
from storage.folder import RunFolder


@dataclass(frozen=True)
class Evaluated:
    """The data of figures: a run that was evaluated on its test set.

    model: in evaluation mode, as for the predictions. results: the content of metrics.json.
    """

    run: RunFolder
    config: Config
    model: AnyMoE
    bank: FeatureBank | ImageBank
    predictions: Predictions
    results: dict[str, Any]

    @property
    def test(self) -> ImageSet:
        """The test images."""
        return self.bank.splits.test

    @property
    def labels(self) -> list[str]:
        """The experts by index and hidden units."""
        return self.results["experts"]

    @property
    def several_experts(self) -> bool:
        """Whether there is a choice to show: a dense twin has a single expert."""
        return len(self.labels) > 1

    @property
    def superclasses(self) -> Sequence[str]:
        """Names of the superclasses, empty if the dataset has none."""
        return self.test.coarse_names

    @property
    def blocks(self) -> BlockRouting | None:
        """The routing in each block, if the experts are inside the ViT."""
        return self.predictions.blocks

    @property
    def block_names(self) -> list[str]:
        """The blocks with experts, by their numbers."""
        return [f"block {row['block']}" for row in self.results.get("blocks", [])]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one per epoch; empty if there are none."""
        return self.run.history()


Draw = Callable[[Evaluated], Figure | None]


@dataclass(frozen=True)
class RegisteredFigure:
    """A registered figure. draw: returns None if there is nothing to show. needs, place: see `register`."""

    name: str
    caption: str
    draw: Draw
    needs: tuple[str, ...]
    place: float


@dataclass(frozen=True)
class Drawing:
    """A figure on disk."""

    name: str
    path: Path
    caption: str


FIGURES: dict[str, RegisteredFigure] = {}


def register(name: str, caption: str, needs: Sequence[str] = (), place: float = 1000) -> Callable[[Draw], Draw]:
    """Register a function from Evaluated to a matplotlib figure, or None, by the name of its file.

    caption: shown below the figure. needs: attributes of Evaluated without which there is nothing to draw. place: the
    figures are shown in ascending order of this number. Raises ValueError for a name that is taken or invalid.
    """
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"figure {name!r}: the name becomes a file name, so use only the letters a to z, digits and _")
    if name in FIGURES:
        raise ValueError(f"figure {name!r} is registered twice: by {FIGURES[name].draw.__module__} first")

    def add(draw: Draw) -> Draw:
        FIGURES[name] = RegisteredFigure(name, caption, draw, tuple(needs), place)
        return draw

    return add


def warn_of_letters(texts: Sequence[str]) -> None:
    """Warn about characters in figures that no font has."""
    if letters := undrawable(texts):
        shown = letters if len(letters) <= 12 else f"{letters[:12]}… ({len(letters)} in all)"
        warn(f"no font has {shown}: figures show boxes instead; install a font that has them, such as Noto Sans")


def draw(evaluated: Evaluated) -> list[Drawing]:
    """Write every registered figure with data to figures/*.png, in order of their places.

    A plug-in figure that fails gives only a warning.
    """
    drawings = []
    for figure in sorted(FIGURES.values(), key=lambda figure: figure.place):
        if drawn := _drawn(figure, evaluated):
            path = save_figure(drawn, evaluated.run.figures / f"{figure.name}.png")
            drawings.append(Drawing(figure.name, path, figure.caption))
    return drawings


def _drawn(figure: RegisteredFigure, evaluated: Evaluated) -> Figure | None:
    try:
        return figure.draw(evaluated) if all(getattr(evaluated, need) for need in figure.needs) else None
    except Exception as error:
        if figure.draw.__module__.startswith(__package__):
            raise
        warn(f"figure {figure.name} could not be drawn ({type(error).__name__}: {one_line(error)})")
        return None


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG. Raises EnvironmentFault if that fails."""
    try:
        return plots.save(figure, path)
    except OSError as error:
        raise EnvironmentFault(f"{path} could not be written: {error.strerror or error}") from error
