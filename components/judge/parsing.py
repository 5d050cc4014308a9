"""From the text of a reply to scores in [0, 1]: repaired where only one reading is possible, refused otherwise.

`thoughts.py` says what of a reply is answer, here the JSON is found in it, and `values.py` reads its values. A reply is
never completed with a number of our own: what cannot be read becomes `UnusableError` with a reason, which the client
answers by asking again and, in the end, by a mask.

In the answer every form counts, fenced or plain, or under a key that says that it is one too ("final_scores"): equal
ones are one answer, different ones are ambiguous. JSON is read as models write it (`relaxed.py`), and may be wrapped
(`forms.py`). Where there is none, a list in words that gives every criterion one number ("Alpha cleanliness: 4/5") is a
form too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from layerloop.components.judge.forms import forms_in
from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.relaxed import read_relaxed, unique
from layerloop.components.judge.replies import Reply, UnusableError, looks_like_refusal
from layerloop.components.judge.requests import Request, Scores
from layerloop.components.judge.rubric import TOP
from layerloop.components.judge.thoughts import answer_of
from layerloop.components.judge.values import TOLERANCE

_FENCE = re.compile(r"(```|~~~)[A-Za-z]*\s*(.*?)(?:\1|\Z)", re.DOTALL)
_GIVES = (  # what lies between a criterion's name and its score, "(0-5)" too
    r"[\s*_`'\"|]*(?:\([^()\d]*0[^()\d]*5[^()\d]*\)[\s*_`'\"|]*)?(?:[:=|\u2192]|\bis\b|[\u2013\u2014-]{verbs})[\s*_`'\"]*"
    r"(\d+(?:\.\d+)?(?:\s*(?:/|out of|of)\s*\d+)?)"
)
_CORRECTS = r"|\b(?:should|must|ought to) be\b|\bbecomes\b|\bto\b"
_SAID = re.compile(r"\s*(?:\d+(?:\.\d+)?\s*(?:$|/|of\b|out\b|[(:;-])|(?:yes|no|true|false)\s*$)", re.IGNORECASE)
_ENDS = re.compile(  # what may follow a score in words: not "4 or 5", "4,5", "3 halos", nor another cell with a number
    r"[^\S\n]*[*_`'\"]*[^\S\n]*(?:\Z|\n|[(!\u2605]|\.(?!\d)|[;,:|)\]\u2013\u2014-](?![\s*_`]*[\d>])|(?:points?|stars?|because|since)\b)",
    re.IGNORECASE,
)
_OTHER_SCALE = re.compile(  # "out of 10", "4/10", "a scale of 1 to 10", "max 10"; amid words only of scores
    r"(?:/|\bout of|\bof|\bto|\bmax(?:imum)?\.?(?: of| is|:)?|[\u2013-])\s*(?:10|100)\b(?!\s*%)", re.IGNORECASE
)
_SCALE_SAID = re.compile(
    r"\b(?:scale|scor(?:es?|ed|ing)|rat(?:ed|ings?))\b[^.\n{}]{0,40}?(?:/|out of|to|[\u2013-])\s*(?:10|100)\b",
    re.IGNORECASE,
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
    answer, complete, after = _find_answer(request, reply)
    try:
        scores = request.answer.read(request, answer)
        _check_uncorrected(scores, after, request)
        return scores
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
    answer, ends = answer_of(reply.text), reply.text.rstrip()
    if answer is None or not ends.endswith(answer.strip()):
        reply = replace(reply, tokens=())  # something follows the answer, so that digits may not be its own
    begin = len(ends) - len((answer or "").strip())
    return request.answer.expected(request, TokenProbabilities(reply, begin), scores)


# ----------------------------------------------------------------------------------------------------- finding the JSON


def _find_answer(request: Request, reply: Reply) -> tuple[Any, bool, str]:
    """The one JSON value in the text that can be the answer, whether the text is complete up to its end, and what
    follows it.

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
    complete = True
    try:
        found, tail = _forms(_decoded(text), request)
        if reply.cut and found and (_begins_another(tail, request) or _goes_on(text)):
            raise UnusableError("truncated", "it was cut off in what follows a form, which may be a draft")
        if not found:
            rest = _closed(text, decimals=request.answer.decimals)
            found, complete = list(forms_in(rest, request)), False
        if not found and "{" not in text and not reply.cut:
            found, complete, tail = _in_words(text, request), True, ""
    except RecursionError:
        raise UnusableError("no_json", "nested too deep") from None
    if not found:
        if looks_like_refusal(text):
            raise UnusableError("refused", " ".join(text.split())[:200])
        raise UnusableError("truncated" if reply.cut else "no_json", " ".join(text.split())[:80])
    found = [form for form in found if _says_something(form)] or found  # the example of the question is no answer
    if any(value != found[0] for value in found[1:]):
        raise UnusableError("ambiguous", f"{len(found)} different answers in one reply")
    return found[0], complete, tail


def _says_something(form: Any) -> bool:
    """Whether a form has any score or yes or no, and not only words ("0 to 5", "clean")."""
    if isinstance(form, dict | list):
        return any(map(_says_something, form.values() if isinstance(form, dict) else form))
    return isinstance(form, int | float) or (isinstance(form, str) and _SAID.match(form) is not None)


def _check_uncorrected(scores: Scores, after: str, request: Request) -> None:
    """Refuse a form after which words give one of its criteria another number ("alpha cleanliness should be 1").

    Raises:
        UnusableError: ambiguous.
    """
    for name in request.names if request.rows == 1 and request.answer.key == "scores" else ():
        for given in _given(name, after, _GIVES.format(verbs=_CORRECTS)):
            number = float(re.split(r"[^\d.]", given[1])[0])
            ends = _ENDS.match(after, given.end()) or re.match(r"\s*(?:instead|rather|now)\b", after[given.end() :])
            if ends and abs(number / TOP - scores[0][name]) > TOLERANCE:
                raise UnusableError("ambiguous", f"after the form {name} is {given[1]}")


def _given(name: str, text: str, gives: str) -> list[re.Match[str]]:
    """Where words give a criterion a number, their first group."""
    words = r"[\s_-]+".join(map(re.escape, name.split("_")))
    return list(re.finditer(rf"(?<!\w){words}{gives}", text, re.IGNORECASE))


def _decoded(text: str) -> str:
    """The text, or what is in it where all of it is one JSON string."""
    try:
        value = json.loads(text) if text.lstrip().startswith('"') else text
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _forms(text: str, request: Request) -> tuple[list[Any], str]:
    """Every JSON value that can be the answer, fenced and plain, and what follows the last of them.

    Raises:
        UnusableError: ambiguous, or out_of_range: the words around them speak of another scale.
    """
    fences = list(_FENCE.finditer(text))
    outside = "\n".join(
        text[start:end]
        for start, end in zip(
            [0, *(fence.end() for fence in fences)], [*(fence.start() for fence in fences), len(text)], strict=True
        )
    )
    found, tail = [], text
    for part, rest in (*((fence[2], text[fence.end() :]) for fence in fences), (outside, "")):
        words, at = "", 0
        for value, start, end in _values(part):
            words, at = words + part[at:start], end
            if forms := list(forms_in(value, request)):
                found += forms
                tail = part[end:] + rest
        if found and (said := _SCALE_SAID.search(words + part[at:])):
            raise UnusableError("out_of_range", f"it speaks of another scale: {said[0]!r}")
    return found, tail


def _begins_another(tail: str, request: Request) -> bool:
    """Whether a form was begun in what follows a complete one."""
    start = tail.find("{")
    return start >= 0 and any(f'"{word}' in tail[start:] for word in (request.answer.key, *request.names, "candidate"))


def _goes_on(text: str) -> bool:
    """Whether a form stands amid words: before a cut it is as likely a draft as the answer."""
    begins = re.match(r"\s*(?:(?:```|~~~)[A-Za-z]*|json)?\s*(?:\[\s*)?\{\s*[\"']", text)
    return begins is None and re.search(r"\w", text[max(text.rfind("}"), text.rfind("]")) + 1 :]) is not None


def _in_words(text: str, request: Request) -> list[dict[str, str]]:
    """Scores in words, `name: number` for every criterion; empty where one is missing, has two numbers, or has one that
    may be of something else."""
    if request.answer.by_candidate or request.answer.key != "scores":
        return []
    form = {}
    for name in request.names:
        given = _given(name, text, _GIVES.format(verbs=""))
        if len({match[1] for match in given}) != 1 or not all(_ENDS.match(text, match.end()) for match in given):
            return []
        form[name] = given[0][1]
    if said := _OTHER_SCALE.search(text):
        raise UnusableError("out_of_range", f"it speaks of another scale: {said[0]!r}")
    return [form]


def _values(text: str) -> Iterator[tuple[Any, int, int]]:
    """Outermost JSON objects and arrays in `text`, in order, each with its index and the one behind it."""
    decoder = json.JSONDecoder(object_pairs_hook=unique, strict=False)  # models write newlines into strings
    at, failed = 0, 0
    while (start := _next_open(text, at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            failed += 1
            if failed > BRACKETS:
                return
            read = read_relaxed(text, start) if failed <= REPAIRS else None
            if read is None:
                at = start + 1
                continue
            value, end = read
        yield value, start, end
        at = end


def _next_open(text: str, at: int) -> int:
    found = [index for index in (text.find("{", at), text.find("[", at)) if index >= 0]
    return min(found, default=-1)


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


def _closed(text: str, *, decimals: bool) -> Any:
    """The value of a text whose end was cut off, if what is there is complete; None if a number may have been cut."""
    start = text.find("{")
    if start < 0:
        return None
    body = text[start:].rstrip().rstrip("`").rstrip()
    *_, (_, stack, inside) = _walk(body, 0)
    if inside or not stack or not body or body[-1] in ":.-+eE" or (decimals and body[-1].isdigit()):
        return None
    read = read_relaxed(body.rstrip(", \n") + "".join(reversed(stack)))
    return None if read is None else read[0]
