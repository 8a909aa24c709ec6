"""Losses and scores during training."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register
from storage.export import read_description


@register(
    "training_curves",
    "Losses and scores by epoch. The star marks the epoch whose weights were kept. Dropout and label "
    "smoothing, if used, raise the training loss above the validation loss.",
    needs=["history"],
    place=10,
)
def training_curves(evaluated: Evaluated) -> Figure:
    run = evaluated.run
    kept = read_description(run).get("epoch") if run.model.is_file() else None
    return plots.training_curves(evaluated.history, best_by="macro_f1/validation", kept=kept)
