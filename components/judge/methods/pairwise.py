"""Phase 2 by pairs: each candidate against each other, criterion by criterion; the score is the win rate."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from layerloop.components.judge.forms import label_of
from layerloop.components.judge.images import EncodedImage
from layerloop.components.judge.methods.method import GridScore, mean_scores
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import (
    SOURCE,
    AnswerFormat,
    Request,
    Scores,
    answer_schema,
    grid_parts,
    json_object,
)
from layerloop.components.judge.rubric import Rubric
from layerloop.components.judge.values import criteria
from layerloop.components.schema.judging import JudgeRecipe, PhaseTwoRecipe

TEXT = "pairwise"
WORDING: tuple[str, ...] = ()
_TIES = dict.fromkeys(("0.0", "tie", "equal", "no difference"), 0) | {"1.0": 1, "2.0": 2}  # as judges write them


def check(rubric: Rubric) -> None:
    """Raises LayerloopError: the rubric has no text `pairwise`."""
    rubric.text(TEXT, method="phase2.method pairwise")


def plan(
    candidates: Sequence[int], shape: tuple[int, int, int], recipe: PhaseTwoRecipe, rng: random.Random
) -> list[list[int]]:
    """All pairs, each in shuffled order."""
    pairs = [list(pair) for pair in itertools.combinations(candidates, 2)]
    for pair in pairs:
        rng.shuffle(pair)
    return pairs


def request(
    rubric: Rubric,
    source: EncodedImage,
    grids: Mapping[str, EncodedImage],
    recipe: JudgeRecipe,
    *,
    phase1: Sequence[Mapping[str, float]],
    layers: int,
    label: str,
) -> Request:
    """Question which of two rows is better: 1, 2, or 0 for no difference. Without phase-1 scores and observations."""
    better = json_object({name: {"type": "integer", "enum": [0, 1, 2]} for name in rubric.names})
    schema, form = answer_schema("better", better, dict.fromkeys(rubric.names, "0, 1 or 2"))
    words = rubric.text(TEXT, method="phase2.method pairwise")
    return Request(
        kind="pairwise",
        label=label,
        system=rubric.system_text(),
        parts=(SOURCE, source, *grid_parts(grids, 2, layers), f"{words}\n{form}"),
        schema=schema,
        names=rubric.names,
        answer=ANSWER,
        rows=2,
        max_tokens=recipe.max_tokens,
    )


def read(request: Request, answer: Any) -> Scores:
    """Win shares of both rows: 1 won, 0.5 tie, 0 lost. Raises UnusableError."""
    first: dict[str, float] = {}
    for name, value in criteria(answer, request, "better").items():
        choice = int(value) if isinstance(value, float) and value in (0, 1, 2) else value
        if (label := _TIES.get(str(choice).strip().lower(), label_of(choice))) not in (0, 1, 2):
            raise UnusableError("out_of_range", f"{name} is {str(value)[:40]!r}, not 0, 1 or 2")
        first[name] = {0: 0.5, 1: 1.0, 2: 0.0}[label]
    return [first, {name: 1.0 - value for name, value in first.items()}]


def combine(grids: Sequence[Sequence[GridScore]], names: Sequence[str]) -> dict[int, dict[str, float]]:
    """candidate -> criterion -> mean win share over the pairs that it was in."""
    shares: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for pair in grids:
        for score in pair:
            shares[score.candidate].append(score.scores)
    return {c: mean_scores(found, names) for c, found in sorted(shares.items())}


ANSWER = AnswerFormat(key="better", read=read)
