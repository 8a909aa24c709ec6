"""Text in any script: draws each text in fonts that have its characters, if matplotlib finds them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

NOT_FOR_TEXT = ("Last Resort", "cm", "STIXNonUnicode", "STIXSize")  # boxes, and the pieces of formulas


class Page(Figure):
    """A figure whose texts fall back to other fonts, letter by letter, where its own font has no glyph for them.

    A letter that no font has is drawn as a box, without matplotlib's warnings; `undrawable` tells of those.
    """

    def draw(self, renderer: Any) -> None:
        """Draw everything. Called by savefig, by notebooks and by canvases."""
        texts = self.findobj(Text)
        for ax in self.axes:  # whose labels of ticks are made when they are asked for
            for axis in (ax.xaxis, ax.yaxis):
                texts += axis.get_ticklabels()
        for text in texts:
            if others := fonts_for(text.get_text()):
                text.set_fontfamily([*matplotlib.rcParams["font.family"], *others])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)


def fonts_for(text: str) -> list[str]:
    """The fonts besides the default one that it takes to draw a text, none where that has all the letters."""
    return list(dict.fromkeys(font for letter in text if (font := _font_of(letter))))


def undrawable(texts: Iterable[str]) -> str:
    """The letters of some texts that no font has, each once."""
    return "".join(sorted({letter for text in texts for letter in text if _font_of(letter) is None}))


@cache
def _font_of(letter: str) -> str | None:
    """The first font that has a letter: "" for the default one, None where none has it."""
    if not letter.isprintable() or letter.isspace() or ord(letter) in _letters(findfont(FontProperties())):
        return ""
    # One file a family, upright and of normal weight where there is one, as matplotlib will choose it.
    plain_last = sorted(fontManager.ttflist, key=lambda font: (font.style == "normal", str(font.weight) == "400"))
    families = {font.name: font.fname for font in plain_last if not font.name.startswith(NOT_FOR_TEXT)}
    return next((name for name, path in sorted(families.items()) if ord(letter) in _letters(path)), None)


@cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font file has; none where it cannot be read."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
