"""What lines of errors and of progress have in common."""

from __future__ import annotations

import re
import unicodedata

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: control characters, surrogates, line breaks
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # direction marks, which disguise a text


def counted(count: int, plural: str) -> str:
    """`1 image`, `2 images`, `1 batch`, `1 reply`."""
    if count != 1:
        return f"{count} {plural}"
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("sses", "ss"), ("s", "")):
        if plural.endswith(ending):
            return f"1 {plural.removesuffix(ending)}{singular}"
    return f"1 {plural}"


def printable(text: str) -> str:
    r"""A text of others as it may stand in a table, a log or JSON: bytes that are not UTF-8 and control characters as
    `\xe9`."""
    return "".join(_escaped(c) if c in _TURNING or unicodedata.category(c) in _UNSEEN else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def size_text(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def reason_of(error: OSError) -> str:
    """Why the operating system refused; shutil's collected errors have no `strerror`."""
    if error.strerror:
        return error.strerror
    collected = error.args[0] if error.args else ""
    if isinstance(collected, list) and collected:  # [(source, target, text)]
        collected = collected[0][-1]
    text = " ".join(str(collected).split())
    if found := re.match(r"\[Errno \d+\] ([^:]+)", text):
        return found[1]
    return text[:200] or type(error).__name__
