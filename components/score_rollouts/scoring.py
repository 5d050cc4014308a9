"""One group judged in two phases: every candidate on its own, then all of them against each other, on one scale."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from layerloop.components.judge.client import Judge
from layerloop.components.judge.grids import draw_grid
from layerloop.components.judge.images import EncodedImage, encode_image, fitted
from layerloop.components.judge.limiter import Limiter
from layerloop.components.judge.methods import PHASE1, PHASE2
from layerloop.components.judge.methods.method import GridScore
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.rubric import Rubric
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.judging import JudgeRecipe, ScoreRow
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import GroupRecord, candidate_key, group_key
from layerloop.components.score_rollouts.judgement import Judgement, prepare
from layerloop.components.score_rollouts.rewards import enough_valid, reward_of, score_rows
from layerloop.components.storage.groups import Group

T = TypeVar("T")
FIRST, LAST = 0, 1  # priorities: phase 2 goes first, because it finishes groups, so that few groups are in memory


@dataclass
class ScoredGroup:
    """Rows of a group, and observations of the judge's order bias: (position, reward less the mean of its grid)."""

    rows: list[ScoreRow]
    dropped: bool
    positions: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _ShownGroup:
    """A group's source and the cells `(L, h, w, 4)` of its candidates, as phase 2 shows them."""

    record: GroupRecord
    source: EncodedImage
    cells: list[Pixels | None]


class Scorer:
    """Judges groups by the recipe's methods; `decode_slots` limits how many candidates are held as images at once."""

    def __init__(self, judge: Judge, recipe: JudgeRecipe, rubric: Rubric, *, seed: int) -> None:
        self.judge, self.recipe, self.rubric, self.seed = judge, recipe, rubric, seed
        self.phase1, self.phase2 = PHASE1[recipe.method], PHASE2[recipe.phase2.method]
        # A batch is sent when all its requests are there, so none may wait for another to be answered.
        self.decode_slots = Limiter(1 << 30 if judge.runtime.batch.enabled else judge.runtime.concurrency + 4)

    async def score(self, group: Group) -> ScoredGroup:
        """Both phases of one group. Failures are masks; LayerloopError only if the judge is gone."""
        source = await asyncio.to_thread(lambda: encode_image(fitted(group.image(), self.recipe.resolution)))
        judgements = [Judgement(candidate) for candidate in group.candidates]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._judge_phase1(group, source, judgement)) for judgement in judgements]
        positions: list[tuple[int, float]] = []
        if self.recipe.phase2.enabled and enough_valid(judgements, self.recipe):
            shown = _ShownGroup(group.record, source, [task.result() for task in running])
            positions = await self._judge_phase2(shown, judgements)
        rows = score_rows(group.record, judgements, self.rubric, self.recipe)
        return ScoredGroup(rows, not enough_valid(judgements, self.recipe), positions)

    # ---------------------------------------------------------------------------------------------------------- phase 1

    async def _judge_phase1(self, group: Group, source: EncodedImage, judgement: Judgement) -> Pixels | None:
        """Fill in `penalty`, `samples` and `phase1`, or `reason`. Returns the candidate's cells for phase 2."""
        record = judgement.candidate.record
        label = candidate_key(record.iteration, record.group, record.candidate)
        async with self.decode_slots.slot(LAST):
            prepared = await asyncio.to_thread(prepare, judgement.candidate, group, self.recipe)
            judgement.penalty = prepared.penalty
            request = self.phase1.request(self.rubric, source, prepared.images, self.recipe, label=label)
            samples = range(self.recipe.samples)
            answers = await _all(self.judge.ask(request, sample=sample, priority=LAST) for sample in samples)
        judgement.samples = [answer[0][0] for answer in answers if not isinstance(answer, UnusableError)]
        if judgement.samples:
            judgement.phase1 = self.phase1.combine(judgement.samples, self.rubric.names)
        else:
            judgement.reason = f"phase1: {answers[0]}"
        return prepared.cells

    # ---------------------------------------------------------------------------------------------------------- phase 2

    async def _judge_phase2(self, shown: _ShownGroup, judgements: Sequence[Judgement]) -> list[tuple[int, float]]:
        """Fill in `phase2` and `repeats`; a candidate that no grid judged is masked. Returns position observations."""
        valid = [index for index, j in enumerate(judgements) if j.reason is None]
        layers, height, width = next(cells.shape[:3] for cells in shown.cells if cells is not None)
        plans: list[tuple[int, int, list[int]]] = []  # (repeat, grid, candidates from top to bottom)
        for repeat in range(self.recipe.phase2.repeats):
            rng = random.Random(seed_for(self.seed, shown.record.iteration, shown.record.image_key, "phase2", repeat))
            orders = self.phase2.plan(valid, (layers, height, width), self.recipe.phase2, rng)
            plans += [(repeat, grid, order) for grid, order in enumerate(orders)]
        answers = await _all(self._judge_grid(shown, judgements, *plan) for plan in plans)
        grids = [answer for answer in answers if not isinstance(answer, UnusableError)]
        failed = next((answer for answer in answers if isinstance(answer, UnusableError)), None)
        self._combine(judgements, valid, grids, failed)
        return [observation for grid in grids for observation in self._positions(grid)]

    async def _judge_grid(
        self, shown: _ShownGroup, judgements: Sequence[Judgement], repeat: int, grid: int, order: list[int]
    ) -> list[GridScore]:
        record = shown.record
        async with self.decode_slots.slot(FIRST):
            stacks = [cells for index in order if (cells := shown.cells[index]) is not None]
            grids: dict[str, EncodedImage] = await asyncio.to_thread(
                lambda: {name: draw_grid(stacks, name) for name in self.recipe.backdrops}
            )
            request = self.phase2.request(
                self.rubric,
                shown.source,
                grids,
                self.recipe,
                phase1=[scores for index in order if (scores := judgements[index].phase1) is not None],
                layers=record.layers,
                label=f"{group_key(record.iteration, record.group)} repeat {repeat} grid {grid}",
            )
            found, _ = await self.judge.ask(request, sample=repeat, priority=FIRST)
        return [
            GridScore(repeat, grid, position, candidate, scores)
            for position, (candidate, scores) in enumerate(zip(order, found, strict=True))
        ]

    def _combine(
        self,
        judgements: Sequence[Judgement],
        valid: Sequence[int],
        grids: Sequence[Sequence[GridScore]],
        failed: UnusableError | None,
    ) -> None:
        names = self.rubric.names
        combined = self.phase2.combine(grids, names)
        repeats = [
            self.phase2.combine([grid for grid in grids if grid[0].repeat == repeat], names)
            for repeat in sorted({grid[0].repeat for grid in grids})
        ]
        for index in valid:
            judgement = judgements[index]
            judgement.phase2 = combined.get(index)
            judgement.repeats = [found[index] for found in repeats if index in found]
            if judgement.phase2 is None:
                judgement.reason = f"phase2: {failed}"

    def _positions(self, grid: Sequence[GridScore]) -> list[tuple[int, float]]:
        rewards = [reward_of(score.scores, self.rubric, self.recipe) for score in grid]
        mean = sum(rewards) / len(rewards)
        return [(score.position, reward - mean) for score, reward in zip(grid, rewards, strict=True)]


async def _all(asked: Iterable[Awaitable[T]]) -> list[T | UnusableError]:
    """Results in order, an UnusableError in place of a missing answer; any other exception cancels the rest."""

    async def one(question: Awaitable[T]) -> T | UnusableError:
        try:
            return await question
        except UnusableError as error:
            return error

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(question)) for question in asked]
    return [task.result() for task in running]
