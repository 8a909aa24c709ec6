"""Names in any script: a fallback font draws missing letters, and there is no warning for each letter."""

import io

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from analysis import plots
from analysis.plots import fonts

pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
RARE = "\u732b"  # a Chinese character that DejaVu Sans does not have


@pytest.fixture
def neko(tmp_path, monkeypatch):
    """A font on the disk that has one letter, found by matplotlib."""
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
    pen = TTGlyphPen(None)
    for step, point in enumerate(((50, 0), (50, 700), (550, 700), (550, 0))):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(RARE): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (600, 0), "cat": (600, 50)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Neko", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(tmp_path / "neko.ttf")
    fonts._font_of.cache_clear()
    fontManager.addfont(tmp_path / "neko.ttf")
    yield "Test Neko"
    fonts._font_of.cache_clear()


def test_a_letter_missing_in_the_default_font_is_drawn_with_a_fallback_font(neko):
    assert fonts.fonts_for(f"cat {RARE} кот") == [neko] and fonts.fonts_for("cat кот ünïcode") == []
    assert fonts.undrawable([f"cat {RARE}", "dog"]) == ""
    figure = plots.confused_pairs([(f"cat {RARE}", "dog", 3, 1)], 9)
    figure.savefig(io.BytesIO(), format="png")
    families = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text)}
    assert families[f"cat {RARE} – dog"][-1] == neko
    assert neko not in families["test images"]


def test_a_letter_that_no_font_has_gives_no_warning_and_is_listed(monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
    fonts._font_of.cache_clear()
    assert fonts.undrawable([f"{RARE}cat", RARE, "\u72ac \n\t"]) == f"\u72ac{RARE}"
    plots.confused_pairs([(RARE, "dog", 3, 1)], 9).savefig(io.BytesIO(), format="png")
    fonts._font_of.cache_clear()
