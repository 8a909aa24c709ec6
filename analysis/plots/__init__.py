"""The figures of the evaluation report, the tracker and the notebook: functions from arrays to a Figure.

Nothing here uses pyplot's global state; only `save` writes a file, a PNG. Colours are safe
for colour-blind readers: Okabe-Ito for experts and series, viridis for maps. Shapes: E experts, C classes, G
superclasses, L blocks, N samples, T epochs, M pictures of H x W pixels, R runs.
"""

from analysis.plots.answers import confused_pairs, reliability, samples, superclass_confusion
from analysis.plots.blocks import block_load, block_load_over_time, block_worth
from analysis.plots.comparison import comparison
from analysis.plots.experts import expert_by_class, expert_load, expert_worth, gate_map
from analysis.plots.patches import patch_maps, patch_positions
from analysis.plots.search import search
from analysis.plots.style import BLUE, OKABE_ITO, save
from analysis.plots.training import load_over_time, training_curves

__all__ = [
    "BLUE",
    "OKABE_ITO",
    "block_load",
    "block_load_over_time",
    "block_worth",
    "comparison",
    "confused_pairs",
    "expert_by_class",
    "expert_load",
    "expert_worth",
    "gate_map",
    "load_over_time",
    "patch_maps",
    "patch_positions",
    "reliability",
    "samples",
    "save",
    "search",
    "superclass_confusion",
    "training_curves",
]
