"""Scores as expected values over the judge's own digit probabilities, where the server gives `top_logprobs`.

A VLM that writes 4 was often torn between 3 and 5. The mean of the digits 0..5 under the probabilities of the token at
that place says more than the digit that was drawn, needs no further sample, and breaks ties within a group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from layerloop.components.judge.parsing import Scores
from layerloop.components.judge.replies import Reply
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import TOP

LEAST_MASS = (
    0.5  # of the probability must be on answers that count, else the place was misjudged or the digits are rare
)


def sharpen(request: Request, reply: Reply, scores: Scores) -> tuple[Scores, int]:
    """Replace every sampled score by its expected value where the tokens allow it.

    Works for whole numbers (phase 1) and for yes/no (checklist); decimals of phase 2 span several tokens and stay.

    Returns:
        The scores, and how many criteria (or questions) could not be sharpened.
    """
    if request.kind not in ("phase1", "checklist"):
        return scores, 0
    spans = _spans(reply)
    out, missed = dict(scores[0]), 0
    for name in request.names:
        place = _last(rf'"{re.escape(name)}"\s*:\s*', reply.text)
        if request.kind == "phase1":
            value = None if place is None else _expected(reply, spans, place, _digit)
            if value is None:
                missed += 1
            else:
                out[name] = value / TOP
            continue
        answers = []
        for question in range(1, request.questions[name] + 1):
            place = None if place is None else _next(rf'"q{question}"\s*:\s*', reply.text, place)
            answers.append(None if place is None else _expected(reply, spans, place, _truth))
        known = [answer for answer in answers if answer is not None]
        missed += len(answers) - len(known)
        if len(known) == len(answers):
            out[name] = sum(known) / len(known)
    return [out], missed


def _spans(reply: Reply) -> list[tuple[int, int]]:
    """Start and end of every token in the text; empty if the tokens do not spell the text."""
    spans, at = [], 0
    for token in reply.tokens:
        spans.append((at, at + len(token["token"])))
        at = spans[-1][1]
    spelled = "".join(token["token"] for token in reply.tokens)
    return spans if spelled.startswith(reply.text) else []


def _last(pattern: str, text: str) -> int | None:
    ends = [found.end() for found in re.finditer(pattern, text)]
    return ends[-1] if ends else None


def _next(pattern: str, text: str, start: int) -> int | None:
    found = re.compile(pattern).search(text, start)
    return None if found is None else found.end()


def _digit(word: str) -> float | None:
    return float(word) if re.fullmatch(rf"[0-{TOP}]", word) else None


def _truth(word: str) -> float | None:
    return {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}.get(word.lower())


def _expected(reply: Reply, spans: Sequence[tuple[int, int]], place: int, read: Any) -> float | None:
    """Mean of `read` over the alternatives of the token at `place`; None if it is no such token, or a rare one."""
    index = next((i for i, (start, end) in enumerate(spans) if start <= place < end), None)
    if index is None:
        return None
    token = reply.tokens[index]
    if read(_core(token["token"])) is None:
        return None
    mass, total = 0.0, 0.0
    seen: set[str] = set()
    for option in token.get("top_logprobs") or []:
        word, logprob = option.get("token"), option.get("logprob")
        if not isinstance(word, str) or word in seen or not isinstance(logprob, int | float) or math.isnan(logprob):
            continue
        seen.add(word)
        value = read(_core(word))
        if value is not None:
            share = math.exp(min(float(logprob), 0.0))
            mass, total = mass + share, total + share * value
    return total / mass if mass >= LEAST_MASS else None


def _core(token: str) -> str:
    """What a token says, without the space, quote, colon or comma that a tokenizer may have joined to it."""
    return token.strip(" \t\n\"':,}")
