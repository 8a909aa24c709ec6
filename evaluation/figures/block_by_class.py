"""Which expert serves which class in the block that specialises most."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register


@register(
    "block_by_class",
    "Distribution of the gate weight of each class's tokens over the experts, in the block that specialises most: the "
    "one whose experts tell most about the class of an image, compared with shuffled labels.",
    needs=["blocks"],
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
        title=f"Which expert serves which class in block {number}",
    )
