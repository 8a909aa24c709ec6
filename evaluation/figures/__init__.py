"""The figures of one evaluation. Each is a function in a separate file, registered with its name and its caption.

The report, ClearML, the notebook and RUN/evaluation/figures show the registered figures. A new figure is one new file
in this folder, or one of your own files named by `--plugins`:

    from evaluation.figures import Evaluated, register

    @register("margin", "How much more the gate gives the first expert than the second.")
    def margin(evaluated: Evaluated) -> matplotlib.figure.Figure: ...
"""

from importlib import import_module
from pkgutil import iter_modules

from evaluation.figures.registry import (
    FIGURES,
    Drawing,
    Evaluated,
    RegisteredFigure,
    draw,
    register,
    save_figure,
    warn_of_letters,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FIGURES", "Drawing", "Evaluated", "RegisteredFigure", "draw", "register", "save_figure", "warn_of_letters"]
