"""Expert load and importance."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "expert_load",
    "Load: share of the assignments. Importance: share of the gate weight.",
    needs=["several_experts"],
    place=30,
)
def expert_load(evaluated: Evaluated) -> Figure:
    results = evaluated.results
    return plots.expert_load(results["expert_load"], results["expert_importance"], evaluated.labels)
