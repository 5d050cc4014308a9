"""Phase 1 by the rubric's anchors: an integer 0..TOP for each criterion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.methods.method import mean_scores
from layerloop.components.judge.methods.single import candidate_parts, without_candidate_label
from layerloop.components.judge.requests import AnswerFormat, Request, Scores, answer_schema, json_object
from layerloop.components.judge.rubric import TOP, Rubric
from layerloop.components.judge.values import criteria, number
from layerloop.components.schema.judging import JudgeRecipe

TEXT = "phase1"
WORDING: tuple[str, ...] = ()


def check(rubric: Rubric) -> None:
    """Raises LayerloopError: the rubric has no text `phase1`."""
    rubric.text(TEXT, method="method rubric")


def request(
    rubric: Rubric, source: EncodedImage, candidate: CandidateImages, recipe: JudgeRecipe, *, label: str
) -> Request:
    """One candidate, by the anchors."""
    scores = json_object({name: {"type": "integer", "enum": list(range(TOP + 1))} for name in rubric.names})
    shape = dict.fromkeys(rubric.names, f"0 to {TOP}")
    schema, form = answer_schema("scores", scores, shape, observations=recipe.observations)
    return Request(
        kind="phase1",
        label=label,
        system=rubric.system_text(),
        parts=(*candidate_parts(source, candidate), f"{rubric.text(TEXT, method='method rubric')}\n{form}"),
        schema=schema,
        names=rubric.names,
        answer=ANSWER,
        max_tokens=recipe.max_tokens,
    )


def read(request: Request, answer: Any) -> Scores:
    """Scores of the one row. Raises UnusableError."""
    values = criteria(without_candidate_label(answer), request, "scores")
    return [{name: number(value, name) for name, value in values.items()}]


def combine(samples: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The mean of each criterion."""
    return mean_scores(samples, names)


def expected(request: Request, tokens: TokenProbabilities, scores: Scores) -> tuple[Scores, int]:
    """The mean of the digits under the probabilities of the token where each score was written."""
    out, missing = dict(scores[0]), 0
    for name in request.names:
        value = tokens.mean(tokens.end_of_only(rf'"{re.escape(name)}"\s*:\s*'), _digit)
        if value is None:
            missing += 1
        else:
            out[name] = value / TOP
    return [out], missing


def _digit(word: str) -> float | None:
    return float(word) if re.fullmatch(rf"[0-{TOP}]", word) else None


ANSWER = AnswerFormat(key="scores", read=read, expected=expected)
