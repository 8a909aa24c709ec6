"""The positions of the patches of each expert."""

from matplotlib.figure import Figure

from analysis import plots
from analysis.blocks import evenly_spaced, patch_choices, position_shares
from evaluation.blocks import patch_grid
from evaluation.figures.registry import Evaluated, register

IMAGES, BLOCKS = 2000, 6


@register(
    "patch_positions",
    "How often the patch at each position of a test image goes to each expert, by its largest gate weight. A map of "
    "one colour means that the gate decides by the content of a patch, not by its position. White line: even share.",
    needs=["blocks", "several_experts"],
    place=6,
)
def patch_positions(evaluated: Evaluated) -> Figure | None:
    found, names = evaluated.blocks, evaluated.block_names
    if found.first_MLT.shape[2] == 1:  # an image decides for all its patches
        return None
    shown = evenly_spaced(len(names), BLOCKS)
    choice_MLHW = patch_choices(found.first_MLT[:IMAGES, shown], *patch_grid(evaluated.model))
    share_LEHW = position_shares(choice_MLHW, len(evaluated.labels))
    return plots.patch_positions(share_LEHW, [names[place] for place in shown], evaluated.labels)
