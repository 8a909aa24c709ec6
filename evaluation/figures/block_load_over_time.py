"""Expert load in each block during training."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "block_load_over_time",
    "Share of each block's tokens per expert in training, with the gate's noise. Dashed: even share. During the shaded "
    "warm-up, routing is random.",
    needs=["blocks", "history", "several_experts"],
    place=41,
)
def block_load_over_time(evaluated: Evaluated) -> Figure | None:
    places, experts = evaluated.blocks.places, range(len(evaluated.labels))
    keys = [[f"expert_load_{place}/expert_{e}" for e in experts] for place in places]
    lines = [line for line in evaluated.history if all(line.get(key) is not None for row in keys for key in row)]
    if not lines:
        return None
    load_TLE = np.array([[[line[key] for key in row] for row in keys] for line in lines], dtype=float)
    steps_per_epoch = lines[0]["step"] / lines[0]["epoch"]
    warmup_epochs = evaluated.config.random_steps / steps_per_epoch
    epochs = [line["epoch"] for line in lines]
    return plots.block_load_over_time(epochs, load_TLE, evaluated.block_names, evaluated.labels, warmup_epochs)
