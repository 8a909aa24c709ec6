"""The contribution of each expert in each block."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "block_worth",
    "Macro-F1 (points) lost when an expert is removed from one block, or (last row) from all blocks, and its tokens go "
    "to the gate's next choice. Above 0: the expert is useful. If the next choice was hardly used in training, this "
    "also adds to the loss. Grey numbers are within one standard deviation over bootstrap resamples of the test "
    "images. Single blocks are measured on the first test images.",
    needs=["blocks", "several_experts"],
    place=51,
)
def block_worth(evaluated: Evaluated) -> Figure | None:
    rows, each = evaluated.results["blocks"], evaluated.results["expert_worth"]
    if "expert_worth" not in rows[0] or "macro_f1_change" not in each[0]:
        return None
    keys = ("macro_f1_change", "macro_f1_deviation")
    change_LE, deviation_LE = (np.array([row["expert_worth"][key] for row in rows]) for key in keys)
    change_E, deviation_E = (np.array([row[key] for row in each]) for key in keys)
    names = (evaluated.block_names, evaluated.labels)
    return plots.block_worth(-change_LE, -change_E, deviation_LE, deviation_E, *names)
