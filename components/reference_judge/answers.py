"""The reference judge's answers: the qualities of `rules.py` in the form that the request asks for.

Like a VLM it is coarse about a single candidate (integers, and nearly always 2 or 3 of 0..5) and finer in phase 2,
where it spreads what it compares around the level of the phase-1 scores. Its full-range variant uses all of 0..5 about
a single candidate, to measure what that coarseness costs (docs/RESULTS.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections import OrderedDict
from typing import Any

from layerloop.components.judge.requests import FORM
from layerloop.components.judge.rubric import TOP
from layerloop.components.reference_judge.identity import NAME, SCORE_RANGE
from layerloop.components.reference_judge.request_images import (
    BadRequestError,
    RequestImages,
    parse_images,
    phase1_scores,
    recover_candidates,
)
from layerloop.components.reference_judge.rules import CRITERIA, RecoveredLayers, qualities

STRETCH = 3.0  # how far phase-2 scores are spread, at most, beyond what each candidate is worth on its own
YES = (0.5, 0.6, 0.7, 0.8)  # quality from which the 1st, 2nd, ... question of a checklist is answered with yes
TIE = 0.01  # quality difference below which a pair is called equal


class QualityCache:
    """Qualities of decompositions already seen (say in phase 1, before a grid): LRU, keyed by a hash of the pixels.

    Not `functools.lru_cache`, which would keep the pixels as keys: gigabytes at 4096 entries.
    """

    def __init__(self, size: int = 4096) -> None:
        self._size, self._lock = size, threading.Lock()
        self._known: OrderedDict[bytes, dict[str, float]] = OrderedDict()

    def qualities(self, seen: RecoveredLayers) -> dict[str, float]:
        """`rules.qualities` of it."""
        digest = hashlib.blake2b(repr(seen.alpha.shape).encode())
        for plane in (seen.source, seen.recomposition, seen.colour, seen.alpha):
            digest.update(plane.tobytes())
        key = digest.digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        found = qualities(seen)
        with self._lock:
            self._known[key] = found
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return found


def answer(
    body: dict[str, Any], cache: QualityCache, *, score_range: float = SCORE_RANGE[NAME]
) -> tuple[str, list[dict[str, Any]] | None, RequestImages]:
    """The text of the reply, its tokens with log-probabilities if they are asked for, and the images it is about.

    Args:
        body: JSON of a chat completion request.
        cache: Of qualities.
        score_range: Share of the scale that scores of a single candidate span, (0, 1].

    Raises:
        BadRequestError: the request cannot be judged, or asks for JSON that this judge cannot give.
    """
    images = parse_images(body.get("messages"))
    form = _asked_form(body, images.question)
    shown = [cache.qualities(seen) for seen in recover_candidates(images)]
    reply: dict[str, Any] = {}
    exact: list[float] = []  # values of the integers in the reply before rounding, in order
    for key, shape in form.items():
        if key == "observations":
            reply[key] = f"{len(shown)} decomposition(s) measured by pixel rules."
        elif key == "scores" and all(name.startswith("candidate_") for name in shape):
            reply[key] = _phase2(shown, phase1_scores(images.question), shape)
        elif key == "scores":
            exact = [TOP * (0.5 + score_range * (_known(shown[0], name) - 0.5)) for name in shape]
            reply[key] = {name: math.floor(value + 0.5) for name, value in zip(shape, exact, strict=True)}
        elif key == "better" and len(shown) == 2:
            reply[key] = {name: _better(_known(shown[0], name), _known(shown[1], name)) for name in shape}
        elif key == "answers":
            reply[key] = {name: _checked(_known(shown[0], name), questions) for name, questions in shape.items()}
        else:
            raise BadRequestError(f"this judge cannot answer {key!r} here", param="response_format")
    text = json.dumps(reply)
    return text, (_tokens(text, exact, body.get("top_logprobs") or 0) if body.get("logprobs") else None), images


def _asked_form(body: dict[str, Any], question: str) -> dict[str, Any]:
    """The keys of the JSON that is asked for, nested: from the schema, else from the words."""
    wanted = body.get("response_format") or {"type": "text"}
    if not isinstance(wanted, dict) or wanted.get("type") not in ("text", "json_object", "json_schema"):
        raise BadRequestError(
            "'response_format.type' must be text, json_object or json_schema", param="response_format"
        )
    if wanted["type"] == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict) or not schema.get("name"):
            raise BadRequestError("'response_format.json_schema' needs a name and a schema", param="response_format")
        form: Any = _keys(schema["schema"])
    else:
        try:
            form = json.JSONDecoder().raw_decode(question[question.index(FORM) + len(FORM) :].lstrip())[0]
        except ValueError:
            raise BadRequestError(f"the last text has no line {FORM!r} with JSON after it", param="messages") from None
    if not isinstance(form, dict) or not all(isinstance(v, dict) for k, v in form.items() if k != "observations"):
        raise BadRequestError("this judge gives scores, answers or better as objects", param="response_format")
    return form


def _keys(schema: Any) -> Any:
    """Property names of a JSON schema of objects, nested; other types become the empty string."""
    if not isinstance(schema, dict):
        raise BadRequestError("'response_format.json_schema.schema' is not a JSON schema", param="response_format")
    if schema.get("type") != "object":
        return ""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties:
        raise BadRequestError("an object of the schema has no properties", param="response_format")
    return {name: _keys(item) for name, item in properties.items()}


def _known(quality: dict[str, float], name: str) -> float:
    if name not in quality:
        raise BadRequestError(f"this judge has no rule for {name!r}, only for {', '.join(CRITERIA)}", param="messages")
    return quality[name]


def _phase2(
    shown: list[dict[str, float]], phase1: list[dict[str, float]], shape: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Each criterion spread around the level of the phase-1 scores, as far as the scale has room."""
    if len(shown) != len(shape):
        raise BadRequestError(f"{len(shown)} rows are shown and {len(shape)} are asked for", param="messages")
    out: dict[str, dict[str, float]] = {name: {} for name in shape}
    for criterion in next(iter(shape.values())):
        values = [_known(quality, criterion) for quality in shown]
        mean = sum(values) / len(values)
        given = [scores[criterion] / TOP for scores in phase1 if criterion in scores]
        if len(given) != len(shown):
            raise BadRequestError(
                f"the question lists first judgements of {len(given)} of {len(shown)} rows for {criterion!r}",
                param="messages",
            )
        level = min(max(sum(given) / len(given), 0.0), 1.0)
        up, down = max(values) - mean, mean - min(values)
        room = min((1 - level) / up if up > 1e-6 else STRETCH, level / down if down > 1e-6 else STRETCH)
        stretch = min(STRETCH, max(room, 1.0))
        for name, value in zip(out, values, strict=True):
            score = TOP * min(max(level + stretch * (value - mean), 0.0), 1.0)
            out[name][criterion] = round(score, 2)
    return out


def _better(first: float, second: float) -> int:
    return 0 if abs(first - second) < TIE else 1 if first > second else 2


def _checked(quality: float, questions: dict[str, Any]) -> dict[str, bool]:
    return {name: quality >= YES[min(index, len(YES) - 1)] for index, name in enumerate(questions)}


def _tokens(text: str, exact: list[float], top: int) -> list[dict[str, Any]]:
    """Tokens of `text` with log-probabilities: the two integers around a score's exact value share all probability, so
    that their mean is that value; everything else is certain."""
    pieces = [piece for piece in re.split(r"(?<=: )(\d)(?=[,}])", text) if piece]
    left = iter(exact)
    out = []
    for piece in pieces:
        options = {piece: 1.0}
        if re.fullmatch(r"\d", piece) and (value := next(left, None)) is not None:
            low = min(math.floor(value), TOP - 1)
            options = {str(low): 1 - (value - low), str(low + 1): value - low}
        entries = [
            _token(word, share) for word, share in sorted(options.items(), key=lambda item: -item[1]) if share > 0
        ]
        chosen = next((entry for entry in entries if entry["token"] == piece), _token(piece, 1e-9))
        out.append({**chosen, "top_logprobs": entries[:top]})
    return out


def _token(word: str, share: float) -> dict[str, Any]:
    return {"token": word, "logprob": math.log(share), "bytes": list(word.encode())}
