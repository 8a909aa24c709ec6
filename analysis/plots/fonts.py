"""Text in any script: draw each text with fonts that have its characters, if matplotlib finds them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

NOT_FOR_TEXT = ("Last Resort", "cm", "STIXNonUnicode", "STIXSize")  # boxes, and parts of formulas


class Page(Figure):
    """A figure whose texts fall back to other fonts, letter by letter, if its own font has no glyph for them.

    A letter that no font has is drawn as a box, without matplotlib's warnings; `undrawable` lists such letters.
    """

    def draw(self, renderer: Any) -> None:
        """Draw everything. Called by savefig, by notebooks and by canvases."""
        texts = self.findobj(Text)
        for ax in self.axes:  # tick labels are created on access
            for axis in (ax.xaxis, ax.yaxis):
                texts += axis.get_ticklabels()
        for text in texts:
            if others := fonts_for(text.get_text()):
                text.set_fontfamily([*matplotlib.rcParams["font.family"], *others])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)


def fonts_for(text: str) -> list[str]:
    """The fonts needed for a text in addition to the default one; none if that has all the letters."""
    return list(dict.fromkeys(font for letter in text if (font := _font_of(letter))))


def undrawable(texts: Iterable[str]) -> str:
    """The letters in some texts that no font has, without duplicates."""
    return "".join(sorted({letter for text in texts for letter in text if _font_of(letter) is None}))


@cache
def _font_of(letter: str) -> str | None:
    """The first font that has a letter: "" for the default one, None if no font has it."""
    if not letter.isprintable() or letter.isspace() or ord(letter) in _letters(findfont(FontProperties())):
        return ""
    # One file per family, upright and of normal weight if there is one, as matplotlib chooses it.
    plain_last = sorted(fontManager.ttflist, key=lambda font: (font.style == "normal", str(font.weight) == "400"))
    families = {font.name: font.fname for font in plain_last if not font.name.startswith(NOT_FOR_TEXT)}
    return next((name for name, path in sorted(families.items()) if ord(letter) in _letters(path)), None)


@cache
def _letters(path: str) -> frozenset[int]:
    """The code points in a font file; none if it cannot be read."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
