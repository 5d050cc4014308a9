"""Values of a parsed reply: scores, answers and labels, each read in every form that has only one reading.

Everything here raises UnusableError for what cannot be read; no number is ever made up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from layerloop.components.judge.forms import (
    NO_ANSWER,
    SCALE,
    by_criterion,
    check_scale,
    is_candidate_label,
    label_of,
    letters,
    named,
    plain,
    wraps,
)
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import TOP

_NUMBER = re.compile(
    r"^\s*([+-]?\d+(?:\.\d+)?)\s*(?:(?:/|out of|of)\s*(\d+(?:\.0+)?))?\s*"
    r"(?:points?|stars?)?\s*(?:(?:\(|\u2013 |\u2014|- |: )[^\d%]*)?$",  # "4 (clean)", "4 - clean", not "3-4"
    re.IGNORECASE,
)
_IN_WORDS = {word: str(value) for value, word in enumerate(("zero", "one", "two", "three", "four", "five"))}
_SCORE = re.compile(r"score|rating|grade|points?|value|answer")
# Names of the field of an entry that says whose it is; of the second kind only where there is none of the first.
_WHOSE = (
    re.compile(r"(?:candidate|row|decomposition)(?:_(?:id|label|name|index|number|no|nr))?"),
    re.compile(r"id|label|name|index|number|no|nr"),
)
TOLERANCE = 1e-6


def criteria(value: Any, request: Request, what: str) -> dict[str, Any]:
    """The value of every criterion of a JSON object, by name; names may differ in case and in what parts their words,
    and the object may wrap the one that has them, or be a list of {"criterion": name, "score": ...}.

    Raises:
        UnusableError: missing_criterion or ambiguous.
    """
    if isinstance(value, list):
        value = by_criterion(value, request)
    if not isinstance(value, dict):
        raise UnusableError("missing_criterion", f"{what} is a {type(value).__name__}")
    inner = [item for key, item in value.items() if named(item, request) and wraps(key, request)]
    if len(inner) == 1 and not named(value, request):
        value = inner[0]
    check_scale(value, request.names)
    names, given = {letters(name): name for name in request.names}, dict[str, Any]()
    for key, item in value.items():
        name = names.get(letters(key), "")
        if name in given and given[name] != item:
            raise UnusableError("ambiguous", f"{name} is given twice")
        if name:
            given[name] = item
    missing = [name for name in request.names if name not in given]
    if missing:
        raise UnusableError("missing_criterion", f"{what} lacks {', '.join(missing)}")
    return {name: given[name] for name in request.names}


def _one_score(value: Mapping[Any, Any], what: str) -> Any:
    """The score of {"score": 4, "reason": ...}. Raises UnusableError: not_a_number (none, or two), out_of_range."""
    check_scale(value)
    kinds = {letters(key): item for key, item in value.items() if not SCALE.fullmatch(letters(key))}
    kinds = {key: item for key, item in kinds.items() if _SCORE.search(key) and not NO_ANSWER.search(key)}
    given = [item for item in kinds.values() if _NUMBER.match(str(item)) or str(item).strip().lower() in _IN_WORDS]
    if not given or any(item != given[0] for item in given[1:]):
        raise UnusableError("not_a_number", f"{what} is {str(value)[:40]!r}")
    return given[0]


def number(value: Any, what: str) -> float:
    """A score 0..TOP as [0, 1]. "4", 4.0, "four", "4/5", "4 (clean)" and {"score": 4} are 4; a boolean, NaN or anything
    out of range is not a score.

    Raises:
        UnusableError: not_a_number or out_of_range.
    """
    if isinstance(value, dict):
        value = _one_score(value, what)
    value = _IN_WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
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
    if isinstance(answer, list) and all(isinstance(e, dict) and len(e) == 1 and _labelled(e) for e in answer):
        answer = [pair for entry in answer for pair in entry.items()]  # [{"candidate_1": ...}, ...]
        labelled = [(_label(key), item) for key, item in answer]
    elif isinstance(answer, list):
        if len(answer) != request.rows:
            raise UnusableError("wrong_count", f"{len(answer)} candidates for {request.rows}")
        labelled = list(zip(_labels(request, answer), answer, strict=True))
    elif isinstance(answer, dict):
        answer = _by_row(request, answer)
        notes = [key for key, item in answer.items() if not is_candidate_label(key) and not named(item, request)]
        kept = answer if not _labelled(answer) else {key: item for key, item in answer.items() if key not in notes}
        labelled = [(_label(key), item) for key, item in kept.items()]
        if any(said - {label} for label, item in labelled if (said := _says(item, _WHOSE[0]))):
            raise UnusableError("wrong_labels", "an entry names another candidate than its key")
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


def _labelled(entry: Mapping[Any, Any]) -> bool:
    return any(map(is_candidate_label, entry))


def _by_row(request: Request, answer: dict[Any, Any]) -> dict[Any, Any]:
    """{"candidate_1": {criterion: ...}} of {criterion: {"candidate_1": ...}} or {criterion: [...]}; others as they are.

    Raises:
        UnusableError: wrong_count: a list of more or fewer values than rows.
    """
    names = {letters(name): name for name in request.names}
    columns = {names[letters(key)]: item for key, item in answer.items() if letters(key) in names}
    if len(columns) != len(names) or not all(isinstance(column, dict | list) for column in columns.values()):
        return answer
    rows: dict[str, dict[str, Any]] = {}
    for name, column in columns.items():
        if isinstance(column, list) and len(column) != request.rows:
            raise UnusableError("wrong_count", f"{len(column)} values of {name} for {request.rows} candidates")
        pairs = column.items() if isinstance(column, dict) else enumerate(column, 1)
        for key, item in pairs:
            row = rows.setdefault(f"candidate_{_label(key)}", {})
            if row.setdefault(name, item) != item:
                raise UnusableError("wrong_labels", "a candidate is scored twice")
    return rows


def _says(entry: Any, names: re.Pattern[str]) -> set[int]:
    """The candidates that an entry names as its own."""
    fields = entry.items() if isinstance(entry, dict) else ()
    return {
        _label(value) for key, value in fields if names.fullmatch(plain(key)) and not isinstance(value, dict | list)
    }


def _labels(request: Request, entries: list[Any]) -> list[int]:
    """Whose each entry of a list is, by its own words; in order where none says anything.

    Raises:
        UnusableError: wrong_labels: only some say it, one says two, or a field of another name numbers the entries in
            another order.
    """
    others = [
        {plain(key): value for key, value in _fields(entry).items() if plain(key) not in (*request.names, "scores")}
        for entry in entries
    ]
    for names in _WHOSE:
        said = [{_label(value) for key, value in other.items() if names.fullmatch(key)} for other in others]
        if any(said):
            if not all(len(labels) == 1 for labels in said):
                raise UnusableError("wrong_labels", "some entries name no candidate, or two")
            return [labels.pop() for labels in said]
    for key in set.intersection(*map(set, others)) if others else ():
        order = [label for other in others if (label := label_of(other[key])) is not None]
        if sorted(order) in (list(range(len(entries))), list(range(1, len(entries) + 1))) and order != sorted(order):
            raise UnusableError("wrong_labels", f"the entries' {key[:40]!r} has another order, or is no label")
    return list(range(1, len(entries) + 1))


def _fields(entry: Any) -> dict[Any, Any]:
    """The fields of an entry, and of the scores in it where it does not say the same itself."""
    if not isinstance(entry, dict):
        return {}
    inner = entry.get("scores")
    return {**inner, **entry} if isinstance(inner, dict) else entry


def _label(given: Any) -> int:
    if (label := label_of(given)) is None:
        raise UnusableError("wrong_labels", f"{str(given)[:40]!r} does not name a candidate")
    return label
