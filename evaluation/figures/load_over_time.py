"""Expert load during training."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "load_over_time",
    "Load on the validation images after each epoch, without noise. During the shaded warm-up training routes at "
    "random, so the gate is still untrained.",
    needs=["history", "several_experts"],
    place=40,
)
def load_over_time(evaluated: Evaluated) -> Figure | None:
    labels = evaluated.labels
    keys = [f"expert_load_validation/expert_{e}" for e in range(len(labels))]
    lines = [line for line in evaluated.history if all(key in line for key in keys)]
    if not lines:
        return None
    steps_per_epoch = lines[0]["step"] / lines[0]["epoch"]
    load_TE = np.array([[line[key] for key in keys] for line in lines], dtype=float)
    warmup_epochs = evaluated.config.random_steps / steps_per_epoch
    return plots.load_over_time([line["epoch"] for line in lines], load_TE, labels, warmup_epochs)
