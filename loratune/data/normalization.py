"""Texts as they are compared: what two people would call the same words is the same text."""

import functools
import re
import sys
import unicodedata

# Shown as nothing, yet not of category Cf: Unicode's Default_Ignorable_Code_Point, which Python's unicodedata does not know.
_INVISIBLE = (0x034F, *range(0x115F, 0x1161), *range(0x17B4, 0x17B6), *range(0x180B, 0x1810), 0x3164, *range(0xFE00, 0xFE10), 0xFFA0)
_TAGS = range(0xE0000, 0xE1000)
# Scripts without spaces between words: each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def normalised(text: str) -> str:
    """NFKC, casefolded, without punctuation and characters that show nothing, single spaces. A text of punctuation alone keeps it.

    Characters that show nothing (category Cf such as the zero-width space, the soft hyphen and the byte order mark; control
    characters; variation selectors) are dropped, not turned into spaces: they stand inside words.
    """
    visible = unicodedata.normalize("NFKC", text.translate(_invisible()))
    folded = unicodedata.normalize("NFKC", visible.casefold())  # casefold may take letters and marks apart
    return " ".join(folded.translate(_punctuation()).split()) or " ".join(folded.split())


def words(text: str) -> list[str]:
    """The words of a normalised text."""
    return _WORD.findall(text)


@functools.cache
def _punctuation() -> dict[int, str]:
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}


@functools.cache
def _invisible() -> dict[int, None]:
    formats = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cf", "Cc") and not chr(code).isspace())
    return dict.fromkeys((*formats, *_INVISIBLE, *_TAGS))
