"""Confusion between superclasses."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "superclass_confusion",
    "Share of each superclass's images, in percent; colours on a square-root scale.",
    needs=["superclasses"],
    place=80,
)
def superclass_confusion(evaluated: Evaluated) -> Figure:
    return plots.superclass_confusion(evaluated.results["superclass_confusion"], evaluated.superclasses)
