"""Names and commands as a terminal shows them: on one line, and valid when they are pasted back into a shell."""

import json
import os
import re
import shlex
import unicodedata
from typing import Any, TextIO

SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control characters, halves of characters (bytes of no encoding in a file name), separators of lines and paragraphs.
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # show a name in another order


def printable(text: object) -> str:
    """`text` on one line, without what a terminal would obey: such characters are escaped as JSON escapes them.

    File names may hold line breaks, escape codes that colour or clear the screen, and bytes of no encoding.
    """
    return "".join(_escaped(letter) if _unseen(letter) else letter for letter in str(text))


def _unseen(letter: str) -> bool:
    return unicodedata.category(letter) in UNSEEN or letter in REORDERING


def _escaped(letter: str) -> str:
    return SHORT.get(letter, f"\\u{ord(letter):04x}")


WHOLE_NUMBERS = re.compile(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]")


def is_unicode(stream: TextIO) -> bool:
    """Whether a stream takes every character; YAML and JSON escape them in their own way where it does not."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def as_json(value: Any, unicode: bool = True) -> str:
    """Readable JSON, each list of whole numbers on one line.

    unicode: characters beyond ASCII as they are, but for bytes of a file name that are no text.
    """
    text = json.dumps(value, indent=2, ensure_ascii=not unicode)
    # No string is touched: JSON writes a line break within one as a backslash and an n.
    text = WHOLE_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def counted(number: int, noun: str) -> str:
    """`1 class`, `2 classes`, `3,000 files`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def quoted(word: object) -> str:
    """A word of a command as a shell reads it back: quoted where it has to be, always on one line."""
    word = str(word)
    if not any(map(_unseen, word)):
        return shlex.quote(word)
    # bash and zsh undo escapes inside $'...'; byte by byte, as the file system has the name.
    return "$'" + "".join(map(_byte, os.fsencode(word))) + "'"


def _byte(value: int) -> str:
    letter = chr(value)
    return letter if 32 <= value < 127 and letter not in "\\'" else f"\\x{value:02x}"


def command(*words: object) -> str:
    """The command `python WORDS`, ready to be pasted into a shell."""
    return " ".join(["python", *map(quoted, words)])
