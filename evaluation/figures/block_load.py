"""Expert load in each block."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "block_load",
    "Share of the tokens that each expert receives in each block; in brackets, if there is room, its share of the "
    "gate's weight.",
    needs=["blocks", "several_experts"],
    place=31,
)
def block_load(evaluated: Evaluated) -> Figure:
    found = evaluated.blocks
    return plots.block_load(found.load_LE, found.importance_LE, evaluated.block_names, evaluated.labels)
