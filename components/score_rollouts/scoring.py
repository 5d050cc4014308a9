"""One group judged in two phases: every candidate alone, then all side by side, on one scale."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from layerloop.components.judge.client import Judge
from layerloop.components.judge.grids import draw_grid, rows_within, split
from layerloop.components.judge.limiter import Limiter
from layerloop.components.judge.pictures import CandidatePictures, Picture, candidate_pictures, fitted, picture
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import alone, pair, prompt_sha256, side_by_side
from layerloop.components.judge.rubric import Rubric
from layerloop.components.layers.measure import bad, duplicate
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.judging import JudgeRecipe, ScoreRow
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import candidate_key, group_key
from layerloop.components.score_rollouts.calibration import (
    Sighting,
    aggregate,
    mean_scores,
    merge,
    reliability,
    spread,
    win_rates,
)
from layerloop.components.storage.groups import Candidate, Group

Scores = dict[str, float]
T = TypeVar("T")
ALONE, TOGETHER = 1, 0  # priorities: what finishes a group goes first, so that few groups are in memory


@dataclass
class Judgement:
    """What is known of one candidate so far; `reason` says why it is masked."""

    candidate: Candidate
    cells: Pixels | None = None  # its layers at the size of a grid cell
    penalty: float = 0.0
    samples: list[Scores] = field(default_factory=list)  # phase 1, one a sample
    phase1: Scores | None = None
    phase2: Scores | None = None
    passes: list[Scores] = field(default_factory=list)  # phase 2, one a repeat
    reason: str | None = None


@dataclass
class ScoredGroup:
    """Rows of a group, and what is seen of the judge's order bias: (position, reward less the mean of its grid)."""

    rows: list[ScoreRow]
    dropped: bool
    positions: list[tuple[int, float]] = field(default_factory=list)


class Scorer:
    """Judges groups; `room` bounds how many candidates are held as pictures at once."""

    def __init__(self, judge: Judge, recipe: JudgeRecipe, rubric: Rubric, *, seed: int) -> None:
        self.judge, self.recipe, self.rubric, self.seed = judge, recipe, rubric, seed
        # A batch is sent when all its requests are there, so none may wait for another to be answered.
        self.room = Limiter(1 << 30 if recipe.batch.enabled else recipe.concurrency + 4)

    async def score(self, group: Group) -> ScoredGroup:
        """Both phases of one group. Failures are masks; LayerloopError only if there is no judge any more."""
        source = await asyncio.to_thread(lambda: picture(fitted(group.image(), self.recipe.resolution)))
        judgements = [Judgement(candidate) for candidate in group.candidates]
        async with asyncio.TaskGroup() as tasks:
            for judgement in judgements:
                tasks.create_task(self._judge_alone(group, source, judgement))
        positions: list[tuple[int, float]] = []
        if self.recipe.phase2.enabled and self._enough(judgements):
            positions = await self._judge_together(group, source, judgements)
        return self._conclude(group, judgements, positions)

    def _enough(self, judgements: list[Judgement]) -> bool:
        return sum(j.reason is None for j in judgements) >= self.recipe.min_valid

    # ---------------------------------------------------------------------------------------------------------- phase 1

    async def _judge_alone(self, group: Group, source: Picture, judgement: Judgement) -> None:
        recipe, record = self.recipe, judgement.candidate.record
        async with self.room.slot(ALONE):
            prepared = await asyncio.to_thread(self._prepare, group, judgement)
            request = alone(
                self.rubric,
                source,
                prepared,
                label=candidate_key(record.iteration, record.group, record.candidate),
                checklist=recipe.method == "checklist",
                observations=recipe.observations,
                max_tokens=recipe.max_tokens,
            )
            asked = (self.judge.ask(request, sample=index, priority=ALONE) for index in range(recipe.samples))
            answers = await _all(asked)
        judgement.samples = [answer[0][0] for answer in answers if not isinstance(answer, UnusableError)]
        if judgement.samples:
            judgement.phase1 = mean_scores(judgement.samples, self.rubric.names)
        else:
            judgement.reason = f"phase1: {answers[0]}"

    def _prepare(self, group: Group, judgement: Judgement) -> CandidatePictures:
        """Decode a candidate once: pictures for phase 1, cells for phase 2, and the rule-based penalty."""
        recipe = self.recipe
        stack = judgement.candidate.stack()
        if recipe.artifact_penalty:
            wrong = bad(stack) | duplicate(stack, group.image()[..., :3])
            judgement.penalty = recipe.artifact_penalty * float(wrong.mean())
        sized = fitted(stack, recipe.resolution)
        if recipe.phase2.enabled:
            judgement.cells = fitted(
                stack if recipe.phase2.resolution > recipe.resolution else sized, recipe.phase2.resolution
            )
        return candidate_pictures(sized, recipe.backdrops)

    # ---------------------------------------------------------------------------------------------------------- phase 2

    async def _judge_together(
        self, group: Group, source: Picture, judgements: list[Judgement]
    ) -> list[tuple[int, float]]:
        """Fill in `phase2` and `passes`; a candidate that no grid judged is masked. Returns position observations."""
        phase2 = self.recipe.phase2
        valid = [index for index, j in enumerate(judgements) if j.reason is None]
        plans: list[tuple[int, int, list[int]]] = []  # (repeat, grid, candidates from top to bottom)
        for repeat in range(phase2.repeats):
            rng = random.Random(seed_for(self.seed, group.record.iteration, group.record.image_key, "phase2", repeat))
            if phase2.method == "pairwise":
                pairs = [list(p) for p in itertools.combinations(valid, 2)]
                for p in pairs:
                    rng.shuffle(p)
                plans += [(repeat, grid, p) for grid, p in enumerate(pairs)]
                continue
            order = valid.copy()
            rng.shuffle(order)
            height, width = judgements[valid[0]].cells.shape[1:3]  # type: ignore[union-attr]
            rows = rows_within(
                phase2.max_megapixels * 1e6,
                columns=group.record.layers + 1,
                height=height,
                width=width,
                at_most=phase2.max_candidates,
            )
            plans += [(repeat, grid, o) for grid, o in enumerate(split(order, rows=rows, overlap=phase2.overlap))]
        answers = await _all(self._judge_grid(group, source, judgements, *plan) for plan in plans)
        for judgement in judgements:
            judgement.cells = None
        grids = [answer for answer in answers if not isinstance(answer, UnusableError)]
        failed = next((answer for answer in answers if isinstance(answer, UnusableError)), None)
        self._merge(judgements, valid, grids, failed)
        return [observation for grid in grids for observation in self._positions(grid)]

    async def _judge_grid(
        self, group: Group, source: Picture, judgements: list[Judgement], repeat: int, grid: int, order: list[int]
    ) -> list[Sighting]:
        recipe, record = self.recipe, group.record
        stacks = [cells for index in order if (cells := judgements[index].cells) is not None]
        async with self.room.slot(TOGETHER):
            drawn: dict[str, Picture] = await asyncio.to_thread(
                lambda: {name: draw_grid(stacks, name) for name in recipe.backdrops}
            )
            label = f"{group_key(record.iteration, record.group)} pass {repeat} grid {grid}"
            if recipe.phase2.method == "pairwise":
                request = pair(
                    self.rubric, source, drawn, layers=record.layers, label=label, max_tokens=recipe.max_tokens
                )
            else:
                first = [scores for index in order if (scores := judgements[index].phase1) is not None]
                request = side_by_side(
                    self.rubric,
                    source,
                    drawn,
                    first=first,
                    layers=record.layers,
                    label=label,
                    observations=recipe.observations,
                    max_tokens=recipe.max_tokens,
                )
            found, _ = await self.judge.ask(request, sample=repeat, priority=TOGETHER)
        return [
            Sighting(repeat, grid, position, candidate, scores)
            for position, (candidate, scores) in enumerate(zip(order, found, strict=True))
        ]

    def _merge(
        self, judgements: list[Judgement], valid: list[int], grids: list[list[Sighting]], failed: UnusableError | None
    ) -> None:
        names = self.rubric.names

        def combine(found: list[list[Sighting]]) -> dict[int, Scores]:
            if self.recipe.phase2.method == "pairwise":
                return win_rates(found, names)
            return merge([sighting for grid in found for sighting in grid], names)

        merged = combine(grids)
        passes = [combine([g for g in grids if g[0].repeat == r]) for r in sorted({g[0].repeat for g in grids})]
        for index in valid:
            judgement = judgements[index]
            judgement.phase2 = merged.get(index)
            judgement.passes = [found[index] for found in passes if index in found]
            if judgement.phase2 is None:
                judgement.reason = f"phase2: {failed}"

    def _positions(self, grid: list[Sighting]) -> list[tuple[int, float]]:
        rewards = [self._reward(s.scores) for s in grid]
        mean = sum(rewards) / len(rewards)
        return [(s.position, reward - mean) for s, reward in zip(grid, rewards, strict=True)]

    # ------------------------------------------------------------------------------------------------------- conclusion

    def _reward(self, scores: Mapping[str, float]) -> float:
        return aggregate(scores, self.rubric.weights, self.recipe.aggregation)

    def _conclude(self, group: Group, judgements: list[Judgement], positions: list[tuple[int, float]]) -> ScoredGroup:
        """Rewards, doubt and weight; too few valid candidates mask the whole group."""
        dropped = not self._enough(judgements)
        valid = sum(j.reason is None for j in judgements)
        rewards: dict[int, float] = {}
        spreads: dict[int, float | None] = {}
        for index, j in enumerate(judgements):
            scores = j.phase2 if self.recipe.phase2.enabled else j.phase1
            if j.reason is None and not dropped and scores is not None:
                rewards[index] = min(max(self._reward(scores) - j.penalty, 0.0), 1.0)
                spreads[index] = spread([self._reward(s) for s in (j.passes if len(j.passes) > 1 else j.samples)])
        weight = 1.0
        if self.recipe.uncertainty_weighting:
            repeats = max((len(j.passes) if len(j.passes) > 1 else len(j.samples) for j in judgements), default=1)
            weight = reliability(list(rewards.values()), list(spreads.values()), repeats)
        rows = [
            ScoreRow(
                iteration=group.record.iteration,
                group=group.record.group,
                candidate=j.candidate.record.candidate,
                image_key=group.record.image_key,
                layers=group.record.layers,
                reward=rewards.get(index),
                reason=None
                if index in rewards
                else j.reason or f"group: {valid} of {len(judgements)} candidates are valid",
                phase1=j.phase1,
                phase2=j.phase2,
                judge=self.recipe.model,
                rubric=self.rubric.name,
                rubric_sha256=self.rubric.sha256,
                weight=weight,
                uncertainty=spreads.get(index),
                reward_phase1=None if j.phase1 is None else self._reward(j.phase1),
                penalty=j.penalty,
                rubric_version=self.rubric.version,
                prompt_sha256=prompt_sha256(self.rubric),
            )
            for index, j in enumerate(judgements)
        ]
        return ScoredGroup(rows, dropped, positions)


async def _all(asked: Iterable[Awaitable[T]]) -> list[T | UnusableError]:
    """Results in order, an UnusableError in place of an answer that there is not; anything else stops all of them."""

    async def one(question: Awaitable[T]) -> T | UnusableError:
        try:
            return await question
        except UnusableError as error:
            return error

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(question)) for question in asked]
    return [task.result() for task in running]
