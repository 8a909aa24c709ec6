"""How reliable the confidences are."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "reliability",
    "Accuracy at each confidence. Bars below the diagonal: overconfident; above it: underconfident, often because of "
    "label smoothing.",
    place=100,
)
def reliability(evaluated: Evaluated) -> Figure:
    results = evaluated.results
    columns = (results["calibration"][name] for name in ("confidence", "accuracy", "count"))
    bins = (np.array([np.nan if value is None else value for value in column]) for column in columns)
    return plots.reliability(*bins, results["expected_calibration_error"])
