"""Text for terminals: names on one line, and commands that can be pasted into a shell."""

import json
import os
import re
import shlex
import unicodedata
from typing import Any, TextIO

SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control characters, surrogates (undecodable bytes of a file name), line and paragraph separators.
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
REORDERING = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # change the order in which a name is shown


def printable(text: object) -> str:
    """`text` on one line; line breaks and control characters are escaped as in JSON.

    File names may contain line breaks, escape codes that colour or clear the screen, and undecodable bytes.
    """
    return "".join(_escaped(letter) if _unseen(letter) else letter for letter in str(text))


def _unseen(letter: str) -> bool:
    return unicodedata.category(letter) in UNSEEN or letter in REORDERING


def _escaped(letter: str) -> str:
    return SHORT.get(letter, f"\\u{ord(letter):04x}")


WHOLE_NUMBERS = re.compile(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]")


def is_unicode(stream: TextIO) -> bool:
    """Whether a stream can write every Unicode character; if not, YAML and JSON escape them."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def as_json(value: Any, unicode: bool = True) -> str:
    """Readable JSON, each list of whole numbers on one line.

    unicode: write characters beyond ASCII as they are, except undecodable bytes of file names.
    """
    text = json.dumps(value, indent=2, ensure_ascii=not unicode)
    # Strings do not change: JSON writes a line break in a string as \n.
    text = WHOLE_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def counted(number: int, noun: str) -> str:
    """`1 class`, `2 classes`, `3,000 files`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def quoted(word: object) -> str:
    """A shell word on one line, quoted if needed."""
    word = str(word)
    if not any(map(_unseen, word)):
        return shlex.quote(word)
    # bash and zsh decode escapes inside $'...'; one per byte of the file name.
    return "$'" + "".join(map(_byte, os.fsencode(word))) + "'"


def _byte(value: int) -> str:
    letter = chr(value)
    return letter if 32 <= value < 127 and letter not in "\\'" else f"\\x{value:02x}"


def command(*words: object) -> str:
    """The command `python WORDS`, ready to paste into a shell."""
    return " ".join(["python", *map(quoted, words)])
