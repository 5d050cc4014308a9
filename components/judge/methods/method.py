"""Interface of a judge method: one module of this folder that asks a question, reads the answer and combines answers.

A method of phase 1 scores one candidate at a time, a method of phase 2 several shown together. To add one, write its
module, add it to the table in `__init__.py` and its name to `schema/judging.py`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import Rubric
from layerloop.components.schema.judging import JudgeRecipe, PhaseTwoRecipe


@dataclass(frozen=True)
class GridScore:
    """One candidate's scores in one grid: which repeat over the group, which grid of it, and which row."""

    repeat: int
    grid: int
    position: int
    candidate: int
    scores: Mapping[str, float]


class Method(Protocol):
    """The part that methods of both phases share."""

    TEXT: str  # key of the method's question in a rubric's YAML
    WORDING: tuple[str, ...]  # words that it sends beyond the rubric's and `requests.WORDING`; they enter prompt_sha256

    def check(self, rubric: Rubric) -> None:
        """Raises LayerloopError: the rubric lacks a text of the method."""


class PhaseOneMethod(Method, Protocol):
    """Scores each candidate on its own."""

    def request(
        self, rubric: Rubric, source: EncodedImage, candidate: CandidateImages, recipe: JudgeRecipe, *, label: str
    ) -> Request:
        """The question about one candidate."""

    def combine(self, samples: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
        """Criterion -> [0, 1], from the answers about one candidate; there is at least one."""


class PhaseTwoMethod(Method, Protocol):
    """Scores the candidates of a group against each other."""

    def plan(
        self, candidates: Sequence[int], shape: tuple[int, int, int], recipe: PhaseTwoRecipe, rng: random.Random
    ) -> list[list[int]]:
        """The grids of one repeat: in each, the candidates from the top row down.

        Args:
            candidates: Numbers of the candidates to score, two or more.
            shape: (L, h, w): layers of a candidate, and pixels of a grid's cell.
            recipe: How many rows a grid may have.
            rng: Source of the shuffled order.
        """

    def request(
        self,
        rubric: Rubric,
        source: EncodedImage,
        grids: Mapping[str, EncodedImage],
        recipe: JudgeRecipe,
        *,
        phase1: Sequence[Mapping[str, float]],
        layers: int,
        label: str,
    ) -> Request:
        """The question about one grid.

        Args:
            rubric: The criteria.
            source: The group's source image.
            grids: Backdrop -> the same grid on that backdrop.
            recipe: How to judge.
            phase1: Phase-1 scores of each row in [0, 1], in the order of the rows.
            layers: Layers of every row.
            label: Human-readable; not sent.
        """

    def combine(self, grids: Sequence[Sequence[GridScore]], names: Sequence[str]) -> dict[int, dict[str, float]]:
        """candidate -> criterion -> [0, 1], of every candidate in any of the grids; {} without grids."""


def mean_scores(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Mean of each criterion over `scores`, one dict or more of criterion -> [0, 1]."""
    return {name: sum(s[name] for s in scores) / len(scores) for name in names}
