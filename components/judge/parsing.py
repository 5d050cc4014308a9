"""From the text of a reply to scores in [0, 1]: repaired where only one reading is possible, refused otherwise.

`thoughts.py` says what of a reply is answer, here the JSON is found in it, and `values.py` reads its values. A reply is
never completed with a number of our own: what cannot be read becomes `UnusableError` with a reason, which the client
answers by asking again and, in the end, by a mask.

In the answer every form counts, fenced or plain: equal ones are one answer, different ones are ambiguous. Where there
is no JSON at all, a list in words that gives every criterion one number ("Alpha cleanliness: 4/5") is a form too.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.replies import Reply, UnusableError, looks_like_refusal
from layerloop.components.judge.requests import Request, Scores
from layerloop.components.judge.thoughts import answer_of
from layerloop.components.judge.values import is_candidate_label, plain

_FENCE = re.compile(r"(```|~~~)[A-Za-z]*\s*(.*?)(?:\1|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_GIVES = (
    r"[\s*_`'\"|]*(?:[:=|]|\bis\b|[\u2013\u2014-])[\s*_`'\"]*(\d+(?:\.\d+)?(?:\s*(?:/|out of)\s*\d+)?)(?![\w%]|\.\d)"
)
LONGEST = 100_000  # characters of a reply that are read; a judgement has a few thousand
BRACKETS = 400  # that open no JSON, until the rest of a reply is taken for words
REPAIRS = 8  # of these that are looked at again with leniency


def parse(request: Request, reply: Reply) -> Scores:
    """Scores of every row that was asked about.

    Raises:
        UnusableError: refused, truncated, no_json, ambiguous, wrong_count, wrong_labels, missing_criterion,
            not_a_number or out_of_range.
    """
    answer, complete = _find_answer(request, reply)
    try:
        return request.answer.read(request, answer)
    except UnusableError as error:
        if complete or error.reason not in ("missing_criterion", "wrong_count", "wrong_labels"):
            raise
        raise UnusableError("truncated", error.detail) from None


def expected_scores(request: Request, reply: Reply, scores: Scores) -> tuple[Scores, int]:
    """Replace every sampled score by its expected value under the reply's token probabilities, where they allow it.

    Works for integers and yes/no; decimals span several tokens and stay.

    Returns:
        The scores, and how many criteria (or questions) stayed as sampled though their method has expected values.
    """
    if request.answer.expected is None:
        return scores, 0
    answer = answer_of(reply.text)
    if answer is None or not reply.text.rstrip().endswith(answer.strip()):
        reply = replace(reply, tokens=())  # something follows the answer, so that the last digits may not be its own
    return request.answer.expected(request, TokenProbabilities(reply), scores)


# ----------------------------------------------------------------------------------------------------- finding the JSON


def _find_answer(request: Request, reply: Reply) -> tuple[Any, bool]:
    """The one JSON value in the text that can be the answer, and whether the text is complete up to its end.

    Raises:
        UnusableError: refused, truncated, no_json or ambiguous.
    """
    if len(reply.text) > LONGEST:
        raise UnusableError("no_json", f"{len(reply.text)} characters")
    text = answer_of(reply.text.lstrip("\ufeff"))
    if text is None:
        raise UnusableError(
            "truncated" if reply.cut else "no_json",
            "it ends inside a thought, where drafts do not count: raise recipe.judge.max_tokens or switch thinking off",
        )
    key, complete = request.answer.key, True
    try:
        found, tail = _forms(text, request)
        if reply.cut and found and _begins_another(tail, request):
            raise UnusableError("truncated", "a second form after the first is cut off")
        if not found:
            rest = _closed(text, decimals=request.answer.decimals)
            found, complete = [rest] if _is_answer(rest, request) else [], False
        if not found and "{" not in text:
            found, complete = _in_words(text, request), True
    except RecursionError:
        raise UnusableError("no_json", "nested too deep") from None
    if not found:
        if looks_like_refusal(text):
            raise UnusableError("refused", " ".join(text.split())[:200])
        raise UnusableError("truncated" if reply.cut else "no_json", " ".join(text.split())[:80])
    if any(value != found[0] for value in found[1:]):
        raise UnusableError("ambiguous", f"{len(found)} different answers in one reply")
    inner = [v for k, v in found[0].items() if plain(k) == key] if isinstance(found[0], dict) else []
    return (inner[0] if inner else found[0]), complete


def _forms(text: str, request: Request) -> tuple[list[Any], str]:
    """Every JSON value that can be the answer, fenced and plain, and what follows the last of them."""
    fences = list(_FENCE.finditer(text))
    outside = "\n".join(
        text[start:end]
        for start, end in zip(
            [0, *(fence.end() for fence in fences)], [*(fence.start() for fence in fences), len(text)], strict=True
        )
    )
    found, tail = [], text
    for part in (*(fence[2] for fence in fences), outside):
        for value, end in _values(part):
            if _is_answer(value, request):
                found.append(value)
                tail = part[end:]
    return found, tail


def _begins_another(tail: str, request: Request) -> bool:
    """Whether a form was begun in what follows a complete one."""
    start = tail.find("{")
    return start >= 0 and any(f'"{word}' in tail[start:] for word in (request.answer.key, *request.names, "candidate"))


def _in_words(text: str, request: Request) -> list[dict[str, str]]:
    """Scores in words, `name: number` for every criterion; empty where one is missing or has two numbers."""
    if request.answer.by_candidate or request.answer.key != "scores":
        return []
    form = {}
    for name in request.names:
        words = r"[\s_-]+".join(map(re.escape, name.split("_")))
        found = {match[1] for match in re.finditer(rf"(?<!\w){words}{_GIVES}", text, re.IGNORECASE)}
        if len(found) != 1:
            return []
        form[name] = found.pop()
    return [form]


def _values(text: str) -> Iterator[tuple[Any, int]]:
    """Outermost JSON (or Python literal) objects and arrays in `text`, in order, each with the index behind it."""
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
        yield value, end
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


def _is_answer(value: Any, request: Request) -> bool:
    """Whether a JSON value can be meant as the answer, however wrong in detail."""
    by_candidate = request.answer.by_candidate
    if isinstance(value, dict):
        keys = {plain(k) for k in value}
        if not by_candidate and keys & set(request.names):
            return True
        return request.answer.key in keys or any(is_candidate_label(k) for k in keys)
    return isinstance(value, list) and by_candidate and any(isinstance(item, dict) for item in value)
