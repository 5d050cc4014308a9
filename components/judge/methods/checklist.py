"""Phase 1 by yes/no questions: a criterion's score is the share of its questions that are answered with yes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.judge.forms import plain
from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.methods.method import mean_scores
from layerloop.components.judge.methods.single import candidate_parts
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import AnswerFormat, Request, Scores, answer_schema, json_object
from layerloop.components.judge.rubric import Rubric
from layerloop.components.judge.values import criteria, yes
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe

TEXT = "checklist"
WORDING: tuple[str, ...] = ()


def check(rubric: Rubric) -> None:
    """Raises LayerloopError: the rubric has no text `checklist`, or a criterion no questions."""
    rubric.text(TEXT, method="method checklist")
    if empty := [c.name for c in rubric.criteria if not c.checklist]:
        raise LayerloopError(
            f"rubric {rubric.name} has no checklist for {empty[0]}: add questions, or choose method rubric"
        )


def request(
    rubric: Rubric, source: EncodedImage, candidate: CandidateImages, recipe: JudgeRecipe, *, label: str
) -> Request:
    """One candidate, by the questions of every criterion. Raises LayerloopError as `check` does."""
    check(rubric)
    asked = {c.name: c.checklist for c in rubric.criteria}
    answers = json_object(
        {name: json_object({f"q{i + 1}": {"type": "boolean"} for i in range(len(q))}) for name, q in asked.items()}
    )
    shape = {name: {f"q{i + 1}": "true or false" for i in range(len(q))} for name, q in asked.items()}
    schema, form = answer_schema("answers", answers, shape, observations=recipe.observations)
    questions = [f"{name}.q{i + 1}: {text}" for name, q in asked.items() for i, text in enumerate(q)]
    words = "\n".join([rubric.text(TEXT, method="method checklist"), *questions])
    return Request(
        kind="checklist",
        label=label,
        system=rubric.system_text(),
        parts=(*candidate_parts(source, candidate), f"{words}\n{form}"),
        schema=schema,
        names=rubric.names,
        answer=ANSWER,
        questions={name: len(q) for name, q in asked.items()},
        max_tokens=recipe.max_tokens,
    )


def read(request: Request, answer: Any) -> Scores:
    """The share of questions answered with yes. Raises UnusableError."""
    out: dict[str, float] = {}
    for name, value in criteria(answer, request, "answers").items():
        count = request.questions[name]
        given = {plain(k): v for k, v in value.items()} if isinstance(value, dict) else value
        if isinstance(given, list):
            given = {f"q{i + 1}": v for i, v in enumerate(given)}
        if not isinstance(given, dict) or set(given) != {f"q{i + 1}" for i in range(count)}:
            raise UnusableError("wrong_count", f"{name} has other questions than q1..q{count}")
        out[name] = sum(yes(v, f"{name}.{k}") for k, v in given.items()) / count
    return [out]


def combine(samples: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The mean of each criterion."""
    return mean_scores(samples, names)


def expected(request: Request, tokens: TokenProbabilities, scores: Scores) -> tuple[Scores, int]:
    """The mean probability of yes over a criterion's questions; `missing` counts questions."""
    out, missing = dict(scores[0]), 0
    for name in request.names:
        at = tokens.end_of_only(rf'"{re.escape(name)}"\s*:\s*')
        answers = []
        for question in range(1, request.questions[name] + 1):
            at = tokens.end_of_next(rf'"q{question}"\s*:\s*', at)
            answers.append(tokens.mean(at, _truth))
        known = [answer for answer in answers if answer is not None]
        missing += len(answers) - len(known)
        if len(known) == len(answers):
            out[name] = sum(known) / len(known)
    return [out], missing


def _truth(word: str) -> float | None:
    return {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}.get(word.lower())


ANSWER = AnswerFormat(key="answers", read=read, expected=expected)
