"""Patch maps: images with each patch in the colour of its expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from analysis.plots.style import OKABE_ITO, Names, new_figure, short

SIDE = 224  # minimum side of a drawn image in pixels
TINT = 0.55  # share of the expert's colour in the colour of a pixel
OTHERS = "#BBBBBB"
COLOURS = (*OKABE_ITO[:7], "#555555")  # grey instead of black, which would hide the image


def patch_maps(
    images_MHWC: Sequence[np.ndarray],
    names: Names,
    choice_MLHW: ArrayLike,
    block_names: Names,
    share_LE: ArrayLike,
    expert_labels: Names,
    title: str = "Which expert processes which patch",
) -> Figure:
    """A row for each image: the original, then for each block the image with patches in the colours of their experts.

    images_MHWC: uint8, one or three channels. names: one or two lines above each image. choice_MLHW: the expert of each
    of H x W patches in each block. share_LE: shares of the block's tokens; the legend shows the mean over the drawn
    blocks.
    """
    choice_MLHW, share_E = np.asarray(choice_MLHW), np.asarray(share_LE, dtype=float).mean(axis=0)
    colours_E = expert_tints(share_E)
    rows, columns = len(images_MHWC), 1 + len(block_names)
    cell = min(1.75, 10.2 / columns)
    figure = new_figure(rows * (cell + 0.2) + 1.0, title, cell * columns + 0.3)
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.02, hspace=0.01)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, image, name, choice_LHW in zip(grid, images_MHWC, names, choice_MLHW, strict=True):
        show_patches(axes, image, choice_LHW, colours_E)
        axes[0].set_title("\n".join(short(line, int(cell * 13)) for line in name.split("\n")), fontsize=7.5, pad=3)
    for ax, name in zip(grid[0, 1:], block_names, strict=True):
        ax.set_title(short(name, int(cell * 13)), fontsize=8.5, pad=3)
    expert_legend(figure, expert_labels, share_E, colours_E)
    return figure


def patch_positions(share_LEHW: ArrayLike, block_names: Names, expert_labels: Names) -> Figure:
    """A row per expert and a column per block: how often a patch at each position goes to the expert.

    share_LEHW: shares that sum to 1 over the experts. Only the eight experts with the highest load are shown.
    """
    share_LEHW = np.asarray(share_LEHW, dtype=float)
    blocks, num_experts = share_LEHW.shape[:2]
    busiest = np.sort(np.argsort(-share_LEHW.mean(axis=(0, 2, 3)), kind="stable")[:8])
    columns = max(3, blocks)  # otherwise the names of the experts would be wider than the page
    figure = new_figure(1.25 * len(busiest) + 0.9, "Positions of the patches of each expert", 1.25 * columns + 2.0)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.08)
    grid = figure.subplots(len(busiest), blocks, squeeze=False)
    norm = Normalize(0, max(share_LEHW.max(), 2 / num_experts))
    for axes, expert in zip(grid, busiest, strict=True):
        for ax, share_HW in zip(axes, share_LEHW[:, expert], strict=True):
            image = ax.imshow(share_HW, norm=norm, cmap="viridis", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        label = f"expert\n{short(expert_labels[expert], 14)}"
        axes[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for ax, name in zip(grid[0], block_names, strict=True):
        ax.set_title(short(name, 12), fontsize=8.5, pad=3)
    bar = figure.colorbar(image, ax=grid, aspect=35, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the images", fontsize=8)
    bar.ax.axhline(1 / num_experts, color="white", lw=1.5)
    bar.ax.text(-0.3, 1 / num_experts, "even", fontsize=7, ha="right", va="center")
    return figure


def show_patches(axes: Sequence[Axes], image_HWC: np.ndarray, choice_LHW: np.ndarray, colours_E: Names) -> None:
    """Draw an image on the first of 1 + L axes, and its patches in each block on the others."""
    for ax, choice_HW in zip(axes, [None, *choice_LHW], strict=True):
        ax.imshow(enlarged(image_HWC) if choice_HW is None else tinted(image_HWC, choice_HW, colours_E))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def expert_legend(figure: Figure, labels: Names, share_E: np.ndarray, colours_E: Names) -> None:
    """The legend below a figure: colours of the experts with sizes and shares; all grey experts are one entry."""
    own = [expert for expert in range(len(labels)) if colours_E[expert] != OTHERS]
    entries = [(colours_E[e], f"expert {short(labels[e], 24)}: {100 * share_E[e]:.0f} %") for e in own]
    if rest := len(labels) - len(own):
        left = 100 * sum(share_E[e] for e in range(len(labels)) if e not in own)
        entries.append((OTHERS, f"{rest} other experts: {left:.0f} %"))
    handles = [Patch(color=colour, alpha=0.9, label=label) for colour, label in entries]
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.75)))
    title = "expert · hidden units: share of the tokens"
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, title=title, title_fontsize=8)


def expert_tints(share_E: ArrayLike) -> list[str]:
    """A colour for each expert, as in all figures; if there are more than eight, those with a lower load are grey."""
    share_E = np.asarray(share_E, dtype=float)
    if len(share_E) <= len(COLOURS):
        return list(COLOURS[: len(share_E)])
    rank_E = np.argsort(np.argsort(-share_E, kind="stable"), kind="stable")
    return [COLOURS[rank] if rank < len(COLOURS) else OTHERS for rank in rank_E]


def tinted(image_HWC: np.ndarray, choice_HW: ArrayLike, colours_E: Names) -> NDArray[np.uint8]:
    """An enlarged image in grey, with each patch of an even grid in the colour of its expert, (H', W', 3) uint8.

    A white line separates patches of different experts.
    """
    choice_HW = np.asarray(choice_HW)
    patch = max(1, -(-SIDE // max(choice_HW.shape)))
    height, width = (count * patch for count in choice_HW.shape)
    grey_HW1 = np.asarray(Image.fromarray(enlarged(image_HWC)).convert("L").resize((width, height)), dtype=float)[
        ..., None
    ]
    colour_HW3 = np.array([to_rgb(colour) for colour in colours_E])[choice_HW] * 255
    colour_HW3 = colour_HW3.repeat(patch, axis=0).repeat(patch, axis=1)
    result = (1 - TINT) * grey_HW1 + TINT * colour_HW3
    down, right = choice_HW[1:] != choice_HW[:-1], choice_HW[:, 1:] != choice_HW[:, :-1]
    for row, column in np.argwhere(down):
        result[(row + 1) * patch - 1 : (row + 1) * patch + 1, column * patch : (column + 1) * patch] = 255
    for row, column in np.argwhere(right):
        result[row * patch : (row + 1) * patch, (column + 1) * patch - 1 : (column + 1) * patch + 1] = 255
    return result.round().astype(np.uint8)


def enlarged(image_HWC: np.ndarray) -> NDArray[np.uint8]:
    """An image as RGB, smoothly enlarged so that its shorter side has at least SIDE pixels."""
    image_HWC = np.asarray(image_HWC, dtype=np.uint8)
    image_HW3 = np.broadcast_to(image_HWC, (*image_HWC.shape[:2], 3))
    height, width = image_HW3.shape[:2]
    scale = max(1.0, SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image_HW3)).resize(size, Image.Resampling.BICUBIC))
