"""JSON as models write it: with comments, trailing commas, other quotation marks, bare keys and fractions.

Every text has one reading here or none: what a value may be is never guessed, a key that is given two values is an
error, and a comment with a number in it ("// or 3?") makes all unread. What is read besides JSON: the JSON5 of
json5.org, Python's literals, the marks of Chinese and typographic keyboards, and 4/5 without quotes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from layerloop.components.judge.replies import UnusableError

_TOKEN = re.compile(
    r"""
      (?P<blank>\s+|//[^\n]*|\#[^\n]*|/\*.*?\*/)
    | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\u201c[^\u201d\n]*\u201d|\u2018[^\u2019\n]*\u2019)
    | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?P<of>[ ]*/[ ]*\d+(?:\.\d+)?)?(?![\w.]))
    | (?P<word>-?[A-Za-z_]\w*(?:-\w+)*)
    | (?P<mark>[{}\[\]:,\uff1a\uff0c\u3001])
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDS = {
    "true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null", "NaN": "NaN",
    "Infinity": "Infinity", "-Infinity": "-Infinity",
}  # fmt: skip
_MARKS = {"\uff1a": ":", "\uff0c": ",", "\u3001": ","}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs, for json's `object_pairs_hook`. Raises UnusableError: ambiguous."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out and out[key] != value:
            raise UnusableError("ambiguous", f"{key!r} is given twice")
        out[key] = value
    return out


def read_relaxed(text: str, start: int = 0) -> tuple[Any, int] | None:
    """The object or list that begins at `start`, and the index behind it; None if it is none.

    Raises:
        UnusableError: ambiguous.
    """
    out: list[str] = []
    at, depth = start, 0
    while (token := _TOKEN.match(text, at)) is not None:
        at, kind = token.end(), token.lastgroup
        if kind == "blank":
            if not token[0].isspace() and re.search(r"\d", token[0]):
                return None
            continue
        piece = _strict(token)
        if piece in "}]" and out and out[-1] == ",":
            out.pop()
        out.append(piece)
        depth += (piece in "{[") - (piece in "}]")
        if depth <= 0:
            break
    if token is None:
        return None
    try:
        return json.loads(" ".join(out), object_pairs_hook=unique), at
    except ValueError:
        return None


def _strict(token: re.Match[str]) -> str:
    """A token as JSON writes it."""
    text = token[0]
    if token["string"]:
        return _string(text)
    if token["number"]:
        if token["of"]:
            return json.dumps(text)
        sign, digits = ("-" if text[0] == "-" else ""), text.lstrip("+-")
        digits = f"0{digits}" if digits[0] == "." else digits
        return sign + re.sub(r"\.(?=$|[eE])", ".0", digits)
    if token["word"]:
        return _WORDS.get(text) or json.dumps(text)
    return _MARKS.get(text, text)


def _string(text: str) -> str:
    inner = text[1:-1]
    if text[0] != '"':
        inner = inner.replace("\\'", "'").replace('\\"', '"').replace('"', '\\"')
    try:
        return json.dumps(json.loads(f'"{inner}"', strict=False))
    except ValueError:  # a backslash that escapes nothing
        return json.dumps(inner)
