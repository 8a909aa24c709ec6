"""The classes that are most often confused with each other."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register("confused_pairs", "The most confused pairs of classes, by number of images.", place=90)
def confused_pairs(evaluated: Evaluated) -> Figure:
    results, keys = evaluated.results, ("class", "other", "as_other", "other_as_class")
    errors = round(results["images"] * (1 - results["accuracy"]))
    return plots.confused_pairs([tuple(row[key] for key in keys) for row in results["confused_pairs"]], errors)
