"""From the text of a reply to scores in [0, 1]: repaired where only one reading is possible, refused otherwise.

A reply is never completed with a number of ours: what cannot be read becomes `UnusableError` with a reason, which the
client answers by asking again and, in the end, by a mask.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from layerloop.components.judge.replies import Reply, UnusableError, looks_like_refusal
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import TOP

Scores = list[dict[str, float]]  # one dict a row, criterion -> [0, 1]

_FENCE = re.compile(r"```[A-Za-z]*\s*(.*?)(?:```|\Z)", re.DOTALL)
_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*(?:(?:/|out of)\s*(\d+(?:\.0+)?))?\s*$")
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_LABEL = re.compile(r"^(?:candidate|row|decomposition)?_?0*(\d+)$")
TOLERANCE = 1e-6
LONGEST = 100_000  # characters of a reply that are read; a judgement has a few thousand
BRACKETS = 400  # that open no JSON, until the rest of a reply is taken for words
REPAIRS = 8  # of these that are looked at again with leniency


def parse(request: Request, reply: Reply) -> Scores:
    """Scores of every row that was asked about.

    Raises:
        UnusableError: refused, truncated, no_json, ambiguous, wrong_count, wrong_labels, missing_criterion,
        not_a_number or
            out_of_range.
    """
    readers: dict[str, Callable[[Request, Any], Scores]] = {
        "phase1": _read_alone,
        "checklist": _read_checklist,
        "phase2": _read_side_by_side,
        "pairwise": _read_pair,
    }
    answer, whole = _find_answer(request, reply)
    try:
        return readers[request.kind](request, answer)
    except UnusableError as error:
        if whole or error.reason not in ("missing_criterion", "wrong_count", "wrong_labels"):
            raise
        raise UnusableError("truncated", error.detail) from None


# ----------------------------------------------------------------------------------------------------- finding the JSON


def _find_answer(request: Request, reply: Reply) -> tuple[Any, bool]:
    """The one JSON value in the text that can be the answer, and whether its end was there."""
    if len(reply.text) > LONGEST:
        raise UnusableError("no_json", f"{len(reply.text)} characters")
    text = _THINKING.sub("", reply.text.lstrip("\ufeff"))
    key = {"checklist": "answers", "pairwise": "better"}.get(request.kind, "scores")
    whole = True
    try:
        fenced = [value for block in _FENCE.findall(text) for value in _values(block)]
        found = [value for value in fenced if _is_answer(value, key, request)]
        found = found or [value for value in _values(text) if _is_answer(value, key, request)]
        if not found:
            rest = _closed(text, decimals=request.kind == "phase2")
            found, whole = [rest] if _is_answer(rest, key, request) else [], False
    except RecursionError:
        raise UnusableError("no_json", "nested too deep") from None
    if not found:
        if looks_like_refusal(text):
            raise UnusableError("refused", " ".join(text.split())[:200], retry=False)
        raise UnusableError("truncated" if reply.cut else "no_json", " ".join(text.split())[:80])
    if any(value != found[0] for value in found[1:]):
        raise UnusableError("ambiguous", f"{len(found)} different answers in one reply")
    inner = [v for k, v in found[0].items() if _plain(k) == key] if isinstance(found[0], dict) else []
    return (inner[0] if inner else found[0]), whole


def _values(text: str) -> Iterator[Any]:
    """Outermost JSON (or Python literal) objects and arrays in `text`, in order."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    at, failed = 0, 0
    while (start := _next_open(text, at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            failed += 1
            if failed > BRACKETS:
                return
            end = _matching(text, start) if failed <= REPAIRS else -1
            value = _lenient(text[start:end]) if end > 0 else None
            if value is None:
                at = start + 1
                continue
        yield value
        at = end


def _next_open(text: str, at: int) -> int:
    found = [index for index in (text.find("{", at), text.find("[", at)) if index >= 0]
    return min(found, default=-1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out and out[key] != value:
            raise UnusableError("ambiguous", f"{key!r} is given twice")
        out[key] = value
    return out


def _lenient(text: str) -> Any:
    """JSON with trailing commas, or a Python literal; None if it is neither."""
    try:
        return json.loads(_TRAILING_COMMA.sub(r"\1", text), object_pairs_hook=_unique)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, TypeError):
        return None


def _walk(text: str, start: int) -> Iterator[tuple[int, list[str], bool]]:
    """(index, open brackets, inside a string) after each character from `start` on."""
    stack: list[str] = []
    inside = escaped = False
    for index in range(start, len(text)):
        char = text[index]
        if inside:
            inside, escaped = (char != '"' or escaped), (char == "\\" and not escaped)
        elif char == '"':
            inside = True
        elif char in "{[":
            stack.append("}" if char == "{" else "]")
        elif char in "}]" and stack:
            stack.pop()
        yield index, stack, inside


def _matching(text: str, start: int) -> int:
    for index, stack, inside in _walk(text, start):
        if not stack and not inside:
            return index + 1
    return -1


def _closed(text: str, *, decimals: bool) -> Any:
    """The value of a text whose end was cut off, if what is there is complete; None if a number may have been cut."""
    start = text.find("{")
    if start < 0:
        return None
    body = text[start:].rstrip().rstrip("`").rstrip()
    *_, (_, stack, inside) = _walk(body, 0)
    if inside or not stack or not body or body[-1] in ":.-+eE" or (decimals and body[-1].isdigit()):
        return None
    return _lenient(body.rstrip(", \n") + "".join(reversed(stack)))


def _is_answer(value: Any, key: str, request: Request) -> bool:
    """Whether a JSON value can be meant as the answer, however wrong in detail."""
    if isinstance(value, dict):
        keys = {_plain(k) for k in value}
        if request.kind != "phase2" and keys & set(request.names):
            return True
        return key in keys or any(_LABEL.match(k) for k in keys)
    return isinstance(value, list) and request.kind == "phase2" and any(isinstance(item, dict) for item in value)


# --------------------------------------------------------------------------------------------------- reading the values


def _plain(key: Any) -> str:
    return re.sub(r"[\s\-]+", "_", str(key).strip().lower())


def _criteria(value: Any, request: Request, what: str) -> dict[str, Any]:
    """The value of every criterion of a JSON object, by name; names may differ in case, spaces and hyphens."""
    if not isinstance(value, dict):
        raise UnusableError("missing_criterion", f"{what} is a {type(value).__name__}")
    given: dict[str, Any] = {}
    for key, item in value.items():
        name = _plain(key)
        if name in given and given[name] != item:
            raise UnusableError("ambiguous", f"{name} is given twice")
        given[name] = item
    missing = [name for name in request.names if name not in given]
    if missing:
        raise UnusableError("missing_criterion", f"{what} lacks {', '.join(missing)}")
    return {name: given[name] for name in request.names}


def _number(value: Any, what: str) -> float:
    """A score 0..TOP as [0, 1]. "4", 4.0 and "4/5" are 4; a boolean, NaN or anything out of range is refused."""
    if isinstance(value, dict) and "score" in value:  # {"score": 4, "reason": "..."}
        value = value["score"]
    if isinstance(value, str) and (match := _NUMBER.match(value)):
        if match.group(2) and float(match.group(2)) != TOP:
            raise UnusableError("out_of_range", f"{what} is {value!r}, not of {TOP}")
        value = float(match.group(1))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableError("not_a_number", f"{what} is {str(value)[:40]!r}")
    try:
        number = float(value)
    except OverflowError:
        raise UnusableError("out_of_range", f"{what} is a number of {len(str(value))} digits") from None
    if not math.isfinite(number):
        raise UnusableError("not_a_number", f"{what} is {number}")
    if not -TOLERANCE <= number <= TOP + TOLERANCE:
        raise UnusableError("out_of_range", f"{what} is {number:g}, outside 0..{TOP}")
    return min(max(number / TOP, 0.0), 1.0)


def _read_alone(request: Request, answer: Any) -> Scores:
    if isinstance(answer, dict) and len(answer) == 1 and _LABEL.match(_plain(next(iter(answer)))):
        answer = next(iter(answer.values()))  # {"candidate_1": {...}} of a judge that saw grids before
    return [{name: _number(value, name) for name, value in _criteria(answer, request, "scores").items()}]


def _read_side_by_side(request: Request, answer: Any) -> Scores:
    rows = _rows(request, answer)
    out: Scores = []
    for label in range(1, request.rows + 1):
        values = _criteria(rows[label], request, f"candidate {label}")
        out.append({name: _number(value, f"candidate {label}.{name}") for name, value in values.items()})
    return out


def _rows(request: Request, answer: Any) -> dict[int, Any]:
    """Label -> scores of every row, from {"candidate_1": ...}, [{"candidate": 1, ...}] or a plain list in order."""
    labelled: list[tuple[int, Any]] = []
    if isinstance(answer, list):
        if len(answer) != request.rows:
            raise UnusableError("wrong_count", f"{len(answer)} candidates for {request.rows}")
        for index, item in enumerate(answer):
            given = next(
                (item[k] for k in ("candidate", "row", "label", "id") if isinstance(item, dict) and k in item), None
            )
            label = index + 1 if given is None else _label(given)
            inner = item.get("scores", item) if isinstance(item, dict) else item
            labelled.append((label, inner))
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


def _label(given: Any) -> int:
    match = _LABEL.match(_plain(given)) if isinstance(given, str | int) and not isinstance(given, bool) else None
    if match is None:
        raise UnusableError("wrong_labels", f"{str(given)[:40]!r} names no candidate")
    return int(match.group(1)[:9])


def _read_pair(request: Request, answer: Any) -> Scores:
    """Win shares of the two rows: 1 to the better, 0 to the other, a half each where there is no difference."""
    first: dict[str, float] = {}
    for name, value in _criteria(answer, request, "better").items():
        choice = value.strip() if isinstance(value, str) else value
        if isinstance(choice, bool) or str(choice) not in ("0", "1", "2", "0.0", "1.0", "2.0"):
            raise UnusableError("out_of_range", f"{name} is {str(value)[:40]!r}, not 0, 1 or 2")
        first[name] = {0: 0.5, 1: 1.0, 2: 0.0}[int(float(choice))]
    return [first, {name: 1.0 - value for name, value in first.items()}]


def _read_checklist(request: Request, answer: Any) -> Scores:
    """The share of questions answered with yes."""
    out: dict[str, float] = {}
    for name, value in _criteria(answer, request, "answers").items():
        count = request.questions[name]
        given = {_plain(k): v for k, v in value.items()} if isinstance(value, dict) else value
        if isinstance(given, list):
            given = {f"q{i + 1}": v for i, v in enumerate(given)}
        if not isinstance(given, dict) or set(given) != {f"q{i + 1}" for i in range(count)}:
            raise UnusableError("wrong_count", f"{name} has other questions than q1..q{count}")
        out[name] = sum(_yes(v, f"{name}.{k}") for k, v in given.items()) / count if count else 0.0
    return [out]


def _yes(value: Any, what: str) -> bool:
    word = str(value).strip().lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise UnusableError("not_a_number", f"{what} is {str(value)[:40]!r}, not true or false")
