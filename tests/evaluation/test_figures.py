"""The registry of figures: a user's file adds a figure to the folder, the page and ClearML."""

import matplotlib.figure
import pytest
from PIL import Image

from evaluation import figures
from evaluation.figures import FIGURES, Evaluated, register


@pytest.fixture
def registry():
    """A registry without figures; those of a test leave it again."""
    before = dict(FIGURES)
    FIGURES.clear()
    yield FIGURES
    FIGURES.clear()
    FIGURES.update(before)


def evaluated(run=None):
    return Evaluated(run, None, None, None, None, {"experts": ["0 · 4"]})


def test_every_figure_has_a_caption_that_is_a_sentence_and_a_unique_place():
    assert len({figure.place for figure in FIGURES.values()}) == len(FIGURES)
    for figure in FIGURES.values():
        assert figure.caption[0].isupper() and figure.caption.endswith("."), figure.name
        assert set(figure.needs) <= set(dir(Evaluated))


def test_figures_are_written_in_the_order_of_their_places_if_there_is_something_to_draw(registry, tmp_path):
    class Run:
        figures = tmp_path

        def history(self):
            return []

    for name, place, options in (("last", 3, {}), ("first", 1, {}), ("needy", 2, {"needs": ["history"]})):
        register(name, f"The {name}.", place=place, **options)(lambda _: matplotlib.figure.Figure())
    register("empty", "Nothing.")(lambda _: None)
    drawings = figures.draw(evaluated(Run()))
    assert [(drawing.name, drawing.caption) for drawing in drawings] == [("first", "The first."), ("last", "The last.")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "last.png"]
    for drawing in drawings:
        with Image.open(drawing.path) as image:
            image.verify()


def test_a_failing_plugin_figure_gives_one_warning(registry, capsys):
    register("mine", "Mine.")(lambda evaluated: 1 / 0)
    assert figures.draw(evaluated()) == []
    assert capsys.readouterr().err == (
        "warning: figure mine could not be drawn (ZeroDivisionError: division by zero)\n"
    )


def test_a_taken_or_invalid_name_is_rejected(registry):
    register("mine", "Mine.")(lambda evaluated: None)
    with pytest.raises(ValueError, match="figure 'mine' is registered twice: by test_figures first"):
        register("mine", "Another.")
    with pytest.raises(ValueError, match=r"figure '\.\./mine': the name becomes a file name"):
        register("../mine", "Mine.")
