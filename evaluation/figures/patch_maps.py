"""Which expert processes which part of an image."""

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from analysis.blocks import evenly_spaced, patch_choices
from evaluation.blocks import patch_grid
from evaluation.figures.registry import Evaluated, register

IMAGES, BLOCKS = 6, 5


@register(
    "patch_maps",
    "The first test images of different classes, and the expert with the largest gate weight for each patch, in "
    "blocks from the first to the last, including the most specialised one. White lines separate patches of different "
    "experts.",
    needs=["blocks", "several_experts"],
    place=5,
)
def patch_maps(evaluated: Evaluated) -> Figure | None:
    found, test, predictions = evaluated.blocks, evaluated.test, evaluated.predictions
    if found.first_MLT.shape[2] == 1:  # an image decides for all its patches
        return None
    numbers = [row["block"] for row in evaluated.results["blocks"]]
    special = numbers.index(evaluated.results["most_specialised_block"])
    shown = evenly_spaced(len(numbers), BLOCKS, including=special)
    first_C = np.unique(predictions.labels_N[: len(found.first_MLT)], return_index=True)[1]
    chosen = np.sort(first_C)[:IMAGES]
    names = []
    for image in chosen:
        true, answer = (test.class_names[label[image]] for label in (predictions.labels_N, predictions.predicted_N))
        names.append(f"✓ {true}" if true == answer else f"{true}\n✗ {answer}")
    return plots.patch_maps(
        test.images_NCHW[chosen].permute(0, 2, 3, 1).numpy(),
        names,
        patch_choices(found.first_MLT[chosen], *patch_grid(evaluated.model))[:, shown],
        [evaluated.block_names[place] for place in shown],
        found.load_LE[shown],
        evaluated.labels,
    )
