"""The contribution of each expert against its cost."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "expert_worth",
    "Macro-F1 lost when one expert is removed and its samples go to the gate's next choice. If that expert was hardly "
    "used in training, this also adds to the loss. Bars: one standard deviation over bootstrap resamples of the test "
    "images.",
    place=50,
)
def expert_worth(evaluated: Evaluated) -> Figure | None:
    rows = evaluated.results["expert_worth"]
    if "macro_f1_change" not in rows[0]:  # a single expert cannot be removed
        return None
    change_E, deviation_E, parameters_E = (
        np.array([row[key] for row in rows]) for key in ("macro_f1_change", "macro_f1_deviation", "parameters")
    )
    return plots.expert_worth(-change_E, deviation_E, parameters_E, evaluated.results["expert_load"], evaluated.labels)
