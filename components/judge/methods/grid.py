"""Phase 2 in grids: all candidates of a group, a row each, scored again with decimals given their phase-1 scores."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerloop.components.judge.grids import rows_within, split
from layerloop.components.judge.images import EncodedImage
from layerloop.components.judge.methods.method import GridScore
from layerloop.components.judge.requests import (
    FIRST,
    SOURCE,
    AnswerFormat,
    Request,
    Scores,
    answer_schema,
    grid_parts,
    json_object,
)
from layerloop.components.judge.rubric import TOP, Rubric
from layerloop.components.judge.values import criteria, number, rows_by_label
from layerloop.components.schema.judging import JudgeRecipe, PhaseTwoRecipe

TEXT = "phase2"
WORDING: tuple[str, ...] = ()
OFFSET_PENALTY = 0.03  # ridge on the grids' offsets, see `combine`


def check(rubric: Rubric) -> None:
    """Raises LayerloopError: the rubric has no text `phase2`."""
    rubric.text(TEXT, method="phase2.method grid and the canaries")


def plan(
    candidates: Sequence[int], shape: tuple[int, int, int], recipe: PhaseTwoRecipe, rng: random.Random
) -> list[list[int]]:
    """All candidates in shuffled order, in one grid or in overlapping ones where one would be too large."""
    layers, height, width = shape
    order = list(candidates)
    rng.shuffle(order)
    rows = rows_within(
        recipe.max_megapixels * 1e6, columns=layers + 1, height=height, width=width, at_most=recipe.max_candidates
    )
    return split(order, rows=rows, overlap=recipe.overlap)


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
    """The rows of a grid scored together; the limit of the reply's tokens grows with the rows."""
    rows = len(phase1)
    names = [f"candidate_{row + 1}" for row in range(rows)]
    score = {"type": "number", "minimum": 0, "maximum": TOP}
    scores = json_object({name: json_object(dict.fromkeys(rubric.names, score)) for name in names})
    shape = {name: dict.fromkeys(rubric.names, f"0.0 to {TOP}.0") for name in names}
    schema, form = answer_schema("scores", scores, shape, observations=recipe.observations)
    lines = [
        f"candidate {row + 1}: " + ", ".join(f"{name} {given[name] * TOP:.1f}" for name in rubric.names)
        for row, given in enumerate(phase1)
    ]
    words = "\n".join([rubric.text(TEXT, method="phase2.method grid"), FIRST, *lines])
    return Request(
        kind="phase2",
        label=label,
        system=rubric.system_text(),
        parts=(SOURCE, source, *grid_parts(grids, rows, layers), f"{words}\n{form}"),
        schema=schema,
        names=rubric.names,
        answer=ANSWER,
        rows=rows,
        max_tokens=recipe.max_tokens * rows,
    )


def read(request: Request, answer: Any) -> Scores:
    """Scores of every row. Raises UnusableError."""
    rows = rows_by_label(request, answer)
    out: Scores = []
    for label in range(1, request.rows + 1):
        values = criteria(rows[label], request, f"candidate {label}")
        out.append({name: number(value, f"candidate {label}.{name}") for name, value in values.items()})
    return out


def combine(grids: Sequence[Sequence[GridScore]], names: Sequence[str]) -> dict[int, dict[str, float]]:
    """Scores of every candidate on one scale, clipped to [0, 1].

    A judge's level differs from grid to grid. Per criterion the scores are modelled as y = t_candidate + o_grid,
    solved by least squares with the smallest offsets o that explain them; candidates shared by grids tie the grids
    together. When every grid shows the same candidates this is their plain mean.
    """
    shown = [score for grid in grids for score in grid]
    candidates = sorted({s.candidate for s in shown})
    numbers = sorted({(s.repeat, s.grid) for s in shown})
    if not candidates:
        return {}
    column = {c: i for i, c in enumerate(candidates)}
    offset = {g: i for i, g in enumerate(numbers)}
    n, m = len(candidates), len(numbers)
    # Ridge on the offsets: unregularised, a constant could be moved between t and o. It is small, so that shared
    # candidates decide, and it leaves no offset to a single grid.
    design = np.zeros((len(shown) + m, n + m))
    for index, s in enumerate(shown):
        design[index, column[s.candidate]] = 1
        design[index, n + offset[s.repeat, s.grid]] = 1
    design[len(shown) :, n:] = np.eye(m) * OFFSET_PENALTY
    values = np.zeros((len(design), len(names)))
    values[: len(shown)] = [[s.scores[name] for name in names] for s in shown]
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return {
        c: {name: float(min(max(solution[column[c], k], 0.0), 1.0)) for k, name in enumerate(names)} for c in candidates
    }


ANSWER = AnswerFormat(key="scores", read=read, by_candidate=True, decimals=True)
