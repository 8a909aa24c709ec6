"""Figures of experts inside blocks: everything is on the page and matches the arrays."""

import numpy as np
import pytest
from conftest import mostly_slow
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from analysis import plots
from analysis.plots.patches import OTHERS, TINT, enlarged, expert_tints, tinted
from analysis.plots.pictures import explanation

pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


def names(blocks, experts):
    return [f"block {b}" for b in range(blocks)], [f"{e} · {16 * 2 ** (e % 4)}" for e in range(experts)]


def shares(*shape):
    return np.random.default_rng(0).dirichlet(np.full(shape[-1], 2.0), shape[:-1])


def maps(images, blocks, experts, side=32, grid=(14, 14), channels=3):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, side, side, channels), dtype=np.uint8)
    choice = rng.integers(0, experts, (images, blocks, *grid))
    words = [f"a rather long class name {i}" for i in range(images)]
    block_names, labels = names(blocks, experts)
    return plots.patch_maps(pixels, words, choice, block_names, shares(blocks, experts), labels)


def worth(blocks, experts):
    lost = np.random.default_rng(0).normal(0.003, 0.004, (blocks + 1, experts))
    lost[0, 0] = np.nan
    return plots.block_worth(
        lost[:-1], lost[-1], np.full_like(lost[:-1], 0.002), [0.002] * experts, *names(blocks, experts)
    )


FIGURES = {
    "load": lambda: plots.block_load(shares(12, 4), shares(12, 4), *names(12, 4)),
    "load of one": lambda: plots.block_load(shares(1, 1), shares(1, 1), *names(1, 1)),
    "load of many": lambda: plots.block_load(shares(32, 64), shares(32, 64), *names(32, 64)),
    "time": lambda: plots.block_load_over_time(np.arange(1, 9), shares(8, 5, 4), *names(5, 4), 1.5),
    "time of one": lambda: plots.block_load_over_time([1], shares(1, 1, 64), *names(1, 64)),
    "worth": lambda: worth(12, 4),
    "worth of many": lambda: worth(2, 64),
    "maps": lambda: maps(3, 4, 4),
    "positions": lambda: plots.patch_positions(np.moveaxis(shares(6, 8, 8, 4), -1, 1), *names(6, 4)),
    "positions of one": lambda: plots.patch_positions(np.ones((1, 1, 4, 4)), *names(1, 1)),
    "positions of many": lambda: plots.patch_positions(np.moveaxis(shares(6, 4, 4, 64), -1, 1), *names(6, 64)),
    "maps of one": lambda: maps(1, 1, 2, side=8, grid=(4, 4), channels=1),
    "maps of many": lambda: maps(1, 5, 20, side=224),
}


@pytest.mark.parametrize("name", mostly_slow(FIGURES, ["load", "time", "worth", "maps"]))
def test_everything_is_inside_the_figure(name):
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01


def test_a_patch_has_the_colour_of_its_expert_over_the_grey_of_its_pixels():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :, 0] = image[:, :, 1] = image[:, :, 2] = 200
    result = tinted(image, [[0, 1], [1, 1]], ["#FF0000", "#0000FF"])
    side = result.shape[0]
    assert result.shape == (side, side, 3) and side >= 224
    quarter = side // 4
    grey = (1 - TINT) * 200
    assert result[quarter, quarter].tolist() == [round(grey + 255 * TINT), round(grey), round(grey)]
    assert result[quarter, 3 * quarter].tolist() == [round(grey), round(grey), round(grey + 255 * TINT)]
    assert result[quarter, side // 2].tolist() == [255, 255, 255]  # between experts 0 and 1
    assert result[3 * quarter, side // 2].tolist() == result[3 * quarter, 3 * quarter].tolist()  # within expert 1


def test_images_of_any_size_and_grey_images_are_enlarged():
    grey = enlarged(np.full((8, 4, 1), 77, dtype=np.uint8))
    assert grey.shape == (448, 224, 3) and (grey == 77).all()
    assert enlarged(np.zeros((300, 300, 3), dtype=np.uint8)).shape == (300, 300, 3)


def test_with_more_experts_than_colours_the_most_used_have_one_each():
    colours = expert_tints([0.01, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.08, 0.01])
    assert colours.count(OTHERS) == 2 and colours[0] == colours[9] == OTHERS
    assert len({to_rgb(colour) for colour in colours}) == 9
    assert expert_tints([0.1, 0.9]) == list(plots.OKABE_ITO[:2])


def test_the_legend_shows_sizes_and_shares():
    figure = plots.patch_maps(
        [np.zeros((8, 8, 3), dtype=np.uint8)], ["cat"], [[[[0, 1]]]], ["block 3"], [[0.25, 0.75]], ["0 · 16", "1 · 64"]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["expert 0 · 16: 25 %", "expert 1 · 64: 75 %"]
    assert [ax.get_title() for ax in figure.axes] == ["cat", "block 3"]


def test_an_explanation_has_a_map_for_each_block_beside_the_bars():
    pixels = [np.zeros((8, 8, 3), dtype=np.uint8)] * 2
    votes = [[("1 · 4", 0.9, "cat", 0.5), ("0 · 2", 0.1, "dog", 0.5)]] * 2
    maps = [[("block 0", [[0, 1]]), ("block 3", [[1, 1]])]] * 2
    figure = explanation(pixels, ["a.png", "b.png"], [[("cat", 0.8)]] * 2, votes, maps=maps)
    FigureCanvasAgg(figure).draw()
    assert [ax.get_title() for ax in figure.axes[3:5]] == ["block 0", "block 3"] and len(figure.axes) == 10
    assert len(explanation(pixels, ["a.png", "b.png"], [[("cat", 0.8)]] * 2, votes).axes) == 6


def test_contributions_are_printed_in_points_and_grey_within_the_deviation():
    figure = plots.block_worth([[0.01, -0.004]], [0.023, 0.0001], [[0.002, 0.005]], [0.002, 0.001], *names(1, 2))
    texts = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert texts == {"1.00": "black", "-0.40": "0.45", "2.30": "white", "0.01": "0.45"}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["block 0", "all blocks"]
