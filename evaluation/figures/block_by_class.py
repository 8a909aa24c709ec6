"""Which expert processes which class in the most specialised block."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "block_by_class",
    "Distribution of the gate weight of each class's tokens over the experts, in the most specialised block: the one "
    "whose experts are most informative about the class of an image, compared with shuffled labels.",
    needs=["blocks", "several_experts"],
    place=21,
)
def block_by_class(evaluated: Evaluated) -> Figure:
    results, test = evaluated.results, evaluated.test
    number = results["most_specialised_block"]
    row = next(row for row in results["blocks"] if row["block"] == number)
    return plots.expert_by_class(
        row["expert_by_class_weight"],
        test.class_names,
        evaluated.labels,
        test.superclass_of_class(),
        evaluated.superclasses or None,
        title=f"Which expert processes which class in block {number}",
    )
