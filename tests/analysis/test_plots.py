from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from conftest import mostly_slow
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plot_helpers import EDGE, MAIN, drawn, labels, texts

from analysis import plots

# Warnings from garbage of other tests that is collected during one of these tests do not belong to it.
pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
    "ignore::DeprecationWarning",  # from calls inside matplotlib
)


@pytest.mark.parametrize("name", mostly_slow(MAIN, ["time", "load", "worth", "comparison"]))
def test_everything_is_inside_the_figure(name):
    figure, canvas = drawn(name)
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert texts(figure)


TICKS = ["class 100", "confusion", "load", "class 10", "worth", "pairs", "12 compared"]


@pytest.mark.parametrize("name", mostly_slow(TICKS, ["load", "worth"]))
def test_tick_labels_do_not_overlap(name):
    figure, _ = drawn(name)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            side = 0 if axis is ax.xaxis else 1
            spans = sorted((box.min[side], box.max[side]) for box in boxes)
            assert all(end <= start + 1 for (_, end), (start, _) in pairwise(spans))


@pytest.mark.slow
def test_superclass_names_do_not_overlap():
    figure, _ = drawn("class 100")
    for ax in figure.axes[:2]:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 10
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_the_names_on_the_map_of_the_gate_do_not_overlap():
    figure, _ = drawn("gate")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


@pytest.mark.parametrize("name", ["time", "worth", "gate"])
def test_the_legend_beside_the_plot_does_not_cover_the_title(name):
    figure, _ = drawn(name)
    assert not figure.legends[0].get_window_extent().overlaps(figure._suptitle.get_window_extent())


def test_curves_of_two_metrics_of_one_split_differ_in_colour():
    rows = [{"epoch": t, "accuracy/validation": 0.5, "macro_f1/validation": 0.4} for t in (1, 2)]
    lines = plots.training_curves(rows).axes[1].get_lines()
    assert len({line.get_color() for line in lines if line.get_label()[0] in "am"}) == 2


def test_the_load_of_one_batch_has_a_separate_title():
    titles = {
        plots.expert_load([1.0], [1.0], labels(1), *images).get_suptitle()
        for images in ((), ("one batch of 9 images",))
    }
    assert titles == {
        "Expert load and importance on the test images",
        "Expert load and importance on one batch of 9 images",
    }


def test_bars_of_pairs_have_the_lengths_of_their_counts():
    figure = plots.confused_pairs([("a", "b", 5, 2), ("c", "d", 3, 0)], 11)
    assert figure.get_suptitle() == "The 2 most confused pairs of classes: 10 of 11 errors"
    single = plots.confused_pairs([("a", "b", 1, 0)], 1)
    assert single.get_suptitle() == "The most confused pair of classes: 1 of 1 error"
    ax = figure.axes[0]
    there, back = (container.datavalues.tolist() for container in ax.containers)
    assert (there, back) == ([5, 3], [2, 0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a – b", "c – d"]
    assert "10 of 11 errors" in ax.figure.get_suptitle()


def test_the_contribution_of_an_expert_is_drawn_in_points_and_sorted():
    figure = plots.expert_worth([0.01, 0.05], [0.002, 0.004], [100, 400], [0.25, 0.75], ["0 · 8", "1 · 32"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1 · 32: +5.00",
        "0 · 8: +1.00",
    ]
    offsets = {tuple(points.get_offsets()[0]) for points in figure.axes[0].collections[-2:]}
    assert offsets == {(100.0, 1.0), (400.0, 5.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGE)
def test_edge_sizes_are_drawn_without_warnings(name):
    FigureCanvasAgg(EDGE[name]()).draw()


def test_the_kept_epoch_is_marked_or_else_the_best():
    rows = [{"epoch": 1, "loss/validation": 2.0, "accuracy/validation": 0.6}]
    rows += [{"epoch": 2, "loss/validation": 1.0, "accuracy/validation": 0.5}]

    def marked(**kwargs):
        figure = plots.training_curves(rows, **kwargs)
        return [label for ax in figure.axes for label in ax.get_legend_handles_labels()[1] if "epoch" in label]

    assert marked() == ["best epoch, 1: 0.6"]
    assert marked(best_by="loss/validation") == ["best epoch, 2: 1"]
    assert marked(best_by="accuracy/test") == []
    assert marked(kept=2) == ["kept epoch, 2: 0.5"]


def test_classes_are_ordered_by_superclass_then_by_dominant_expert():
    share = np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])

    def order(**kwargs):
        figure = plots.expert_by_class(share, list("abcd"), labels(2), **kwargs)
        return "".join(label.get_text() for label in figure.axes[0].get_xticklabels())

    assert order() == "bcad"
    assert order(group_C=[1, 0, 1, 0], group_names=["x", "y"]) == "bdca"


def test_dollar_signs_in_names_are_not_math():
    figure = plots.expert_by_class(np.eye(2), ["$\\frac$", "a$b"], ["0 · $\\bad$", "1"], [0, 1], ["$\\x$", "$"])
    FigureCanvasAgg(figure).draw()


def test_save_writes_a_whole_png_and_nothing_else(tmp_path):
    figure = MAIN["load"]()
    path = plots.save(figure, tmp_path / "figures" / "load.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert matplotlib.image.imread(path).shape[1] == 1200
    assert [file.name for file in path.parent.iterdir()] == ["load.png"]


def test_save_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    figure = MAIN["load"]()
    path = plots.save(figure, tmp_path / "load.png")
    before = path.read_bytes()
    monkeypatch.setattr(figure, "savefig", lambda target, **_: (target.write_bytes(b"truncated"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_superclasses_that_are_never_confused_leave_a_blank_cell():
    figure = plots.superclass_confusion([[9, 0, 1], [0, 4, 0], [0, 0, 0]], list("abc"))
    (image,) = figure.axes[0].images
    colours = image.to_rgba(image.get_array())
    blank = [tuple(colours[cell]) == (1, 1, 1, 1) for cell in ((0, 1), (1, 0), (0, 2), (0, 0))]
    assert blank == [True, True, False, False]
    assert tuple(colours[2, 0]) != (1, 1, 1, 1)  # no samples: unknown
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["10", "100", "90"]


def test_the_numbers_of_a_few_compared_runs_are_printed():
    values = {"score": {"macro-F1": [91.25, np.nan], "accuracy": [92.5, 93.5]}}
    assert {text.get_text() for text in plots.comparison(list("ab"), values).axes[0].texts} == {"91.25", "92.5", "93.5"}
    many = {"score": {"macro-F1": np.arange(20.0)}}
    assert not plots.comparison([str(run) for run in range(20)], many).axes[0].texts


def test_a_search_shows_each_trial_and_stars_the_best():
    scores, curves = [0.5, None, 0.7], [[0.2, 0.5], [0.1], [0.4, 0.7]]
    options = {"optim.lr": [1e-3, 1e-2, 1e-1], "router.kind": ["vmoe", "switch", "vmoe"], "router.top_k": [1, 2, 2]}
    figure = plots.search(scores, curves, options, logarithmic=["optim.lr"])
    training, rate, kind, top_k, *empty = figure.axes
    assert [line.get_ydata().tolist() for line in training.lines] == [[20, 50], [10], [40, 70]]
    assert rate.get_xscale() == "log" and "log scale" in rate.get_xlabel()
    every, star = rate.collections
    assert every.get_offsets().tolist() == [[1e-3, 50], [1e-1, 70]]  # the pruned one has no score
    assert star.get_offsets().tolist() == [[1e-1, 70]]
    assert [label.get_text().strip() for label in kind.get_xticklabels()] == ["switch", "vmoe"]
    assert not any(ax.axison for ax in empty) and top_k.get_xlabel() == "router.top_k"
    assert top_k.get_xticks().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("rates", "ticks"),
    [
        ([1.2e-3, 8.5e-3], ["0.002", "0.005"]),
        ([1.2e-3, 1.9e-3], ["0.0012", "0.0019"]),
        ([3e-3, 3e-3], ["0.003"]),
        ([1e-4, 1e-2], None),
    ],
)
def test_a_logarithmic_option_of_a_search_has_ticks_within_a_decade_too(rates, ticks):
    ax = plots.search([0.5, 0.6], [[0.5], [0.6]], {"optim.lr": rates}, logarithmic=["optim.lr"]).axes[1]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ticks if ticks else len(labels) > 1
