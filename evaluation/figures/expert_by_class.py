"""Which expert processes which class."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "expert_by_class",
    "Distribution of the gate weight of each class over the experts; a column sums to 100 %. In brackets, if there is "
    "room: share of the assignments. An expert may process many images of a class with little weight.",
    needs=["several_experts"],
    place=20,
)
def expert_by_class(evaluated: Evaluated) -> Figure:
    results, test = evaluated.results, evaluated.test
    return plots.expert_by_class(
        results["expert_by_class_weight"],
        test.class_names,
        evaluated.labels,
        test.superclass_of_class(),
        evaluated.superclasses or None,
        results["expert_by_class"],
    )
