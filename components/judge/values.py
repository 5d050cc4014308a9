"""Values of a parsed reply: scores, answers and labels, each read in every form that has only one reading.

Everything here raises UnusableError for what cannot be read; no number is ever made up.
"""

from __future__ import annotations

import math
import re
from typing import Any

from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import TOP

_NUMBER = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*(?:(?:/|out of|of)\s*(\d+(?:\.0+)?))?\s*$")
_LABEL = re.compile(r"^(?:candidate|row|decomposition)?_?0*(\d+)$")
# Names of the field of an entry that says whose it is; of the second kind only where there is none of the first.
_WHOSE = (
    re.compile(r"(?:candidate|row|decomposition)(?:_(?:id|label|name|index|number|no|nr))?"),
    re.compile(r"id|label|name|index|number|no|nr"),
)
TOLERANCE = 1e-6


def plain(key: Any) -> str:
    """A key in lower case with underscores, as a judge may write it in any case, with spaces or hyphens."""
    return re.sub(r"[\s\-]+", "_", str(key).strip().lower())


def is_candidate_label(key: Any) -> bool:
    """Whether a key names a row: "candidate_1", "row 1" or "1"."""
    return _LABEL.match(plain(key)) is not None


def criteria(value: Any, request: Request, what: str) -> dict[str, Any]:
    """The value of every criterion of a JSON object, by name; names may differ in case, spaces and hyphens.

    Raises:
        UnusableError: missing_criterion or ambiguous.
    """
    if not isinstance(value, dict):
        raise UnusableError("missing_criterion", f"{what} is a {type(value).__name__}")
    given: dict[str, Any] = {}
    for key, item in value.items():
        name = plain(key)
        if name in given and given[name] != item:
            raise UnusableError("ambiguous", f"{name} is given twice")
        given[name] = item
    missing = [name for name in request.names if name not in given]
    if missing:
        raise UnusableError("missing_criterion", f"{what} lacks {', '.join(missing)}")
    return {name: given[name] for name in request.names}


def number(value: Any, what: str) -> float:
    """A score 0..TOP as [0, 1]. "4", 4.0 and "4/5" are 4; a boolean, NaN or anything out of range is not a score.

    Raises:
        UnusableError: not_a_number or out_of_range.
    """
    if isinstance(value, dict) and "score" in value:  # {"score": 4, "reason": "..."}
        value = value["score"]
    if isinstance(value, str) and (match := _NUMBER.match(value)):
        if match.group(2) and float(match.group(2)) != TOP:
            raise UnusableError("out_of_range", f"{what} is {value!r}, not of {TOP}")
        value = float(match.group(1))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableError("not_a_number", f"{what} is {str(value)[:40]!r}")
    try:
        score = float(value)
    except OverflowError:
        raise UnusableError("out_of_range", f"{what} is a number of {len(str(value))} digits") from None
    if not math.isfinite(score):
        raise UnusableError("not_a_number", f"{what} is {score}")
    if not -TOLERANCE <= score <= TOP + TOLERANCE:
        raise UnusableError("out_of_range", f"{what} is {score:g}, outside 0..{TOP}")
    return min(max(score / TOP, 0.0), 1.0)


def yes(value: Any, what: str) -> bool:
    """true, "yes" or 1, or the opposite. Raises UnusableError: not_a_number."""
    word = str(value).strip().lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise UnusableError("not_a_number", f"{what} is {str(value)[:40]!r}, not true or false")


def rows_by_label(request: Request, answer: Any) -> dict[int, Any]:
    """Label -> scores of every row, from {"candidate_1": ...}, [{"candidate": 1, ...}] or a plain list in order, whose
    entries say nothing of another one.

    Raises:
        UnusableError: no_json, wrong_count or wrong_labels.
    """
    labelled: list[tuple[int, Any]] = []
    if isinstance(answer, list):
        if len(answer) != request.rows:
            raise UnusableError("wrong_count", f"{len(answer)} candidates for {request.rows}")
        inner = [item.get("scores", item) if isinstance(item, dict) else item for item in answer]
        labelled = list(zip(_labels(request, answer), inner, strict=True))
    elif isinstance(answer, dict):
        labelled = [(_label(key), item) for key, item in answer.items()]
    else:
        raise UnusableError("no_json", f"the scores are a {type(answer).__name__}")
    rows = dict(labelled)
    if len(rows) != len(labelled):
        raise UnusableError("wrong_labels", "a candidate is scored twice")
    if len(rows) != request.rows:
        raise UnusableError("wrong_count", f"{len(rows)} candidates for {request.rows}")
    if set(rows) != set(range(1, request.rows + 1)):
        raise UnusableError("wrong_labels", f"labels {sorted(rows)[:12]} for 1..{request.rows}")
    return rows


def _labels(request: Request, entries: list[Any]) -> list[int]:
    """Whose each entry of a list is, by its own words; in order where none says anything.

    Raises:
        UnusableError: wrong_labels: only some say it, one says two, or a field of another name numbers the entries in
            another order.
    """
    others = [
        {plain(key): value for key, value in entry.items() if plain(key) not in (*request.names, "scores")}
        if isinstance(entry, dict)
        else {}
        for entry in entries
    ]
    for names in _WHOSE:
        said = [{_label(value) for key, value in other.items() if names.fullmatch(key)} for other in others]
        if any(said):
            if not all(len(labels) == 1 for labels in said):
                raise UnusableError("wrong_labels", "some entries name no candidate, or two")
            return [labels.pop() for labels in said]
    for key in set.intersection(*map(set, others)) if others else ():
        numbers = [_LABEL.match(plain(other[key])) for other in others]
        order = [int(match[1][:9]) for match in numbers if match]
        if sorted(order) in (list(range(len(entries))), list(range(1, len(entries) + 1))) and order != sorted(order):
            raise UnusableError("wrong_labels", f"the entries' {key[:40]!r} has another order, or is no label")
    return list(range(1, len(entries) + 1))


def _label(given: Any) -> int:
    match = _LABEL.match(plain(given)) if isinstance(given, str | int) and not isinstance(given, bool) else None
    if match is None:
        raise UnusableError("wrong_labels", f"{str(given)[:40]!r} does not name a candidate")
    return int(match.group(1)[:9])
