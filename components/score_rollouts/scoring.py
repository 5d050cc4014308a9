"""One group judged in two phases: every candidate on its own, then all of them against each other, on one scale."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from layerloop.components.judge.client import Judge
from layerloop.components.judge.grids import draw_grid
from layerloop.components.judge.images import EncodedImage, encode_image, fitted
from layerloop.components.judge.limiter import Limiter
from layerloop.components.judge.methods import PHASE1, PHASE2
from layerloop.components.judge.methods.method import GridScore
from layerloop.components.judge.replies import Reply, UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.requests import Scores as Answered
from layerloop.components.judge.rubric import Rubric
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.judging import JudgeRecipe, ScoreRow
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import GroupRecord, candidate_key, group_key
from layerloop.components.score_rollouts.ahead import MOST_BYTES, Ahead, pixels_sha256
from layerloop.components.score_rollouts.follow_ups import Grid, follow_ups
from layerloop.components.score_rollouts.judgement import Judgement, prepare
from layerloop.components.score_rollouts.rewards import enough_valid, reward_of, score_rows
from layerloop.components.storage.groups import Group

T = TypeVar("T")
_Answer = list[GridScore] | UnusableError  # of a grid
REFUSALS = 1  # times that a candidate whose request was refused is asked about again; a grid has its follow-ups
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


@dataclass(frozen=True)
class _Phase1:
    """The answers of phase 1 about a candidate, its penalty, and its cells `(L, h, w, 4)` for phase 2."""

    answers: list[tuple[Answered, Reply] | UnusableError]
    penalty: float
    cells: Pixels | None
    pixels_sha256: str | None = None  # of what was judged, where that was ahead of its group


class Scorer:
    """Judges groups by the recipe's methods; `decode_slots` limits how many candidates are held as images at once."""

    def __init__(self, judge: Judge, recipe: JudgeRecipe, rubric: Rubric, *, seed: int) -> None:
        self.judge, self.recipe, self.rubric, self.seed = judge, recipe, rubric, seed
        self.phase1, self.phase2 = PHASE1[recipe.method], PHASE2[recipe.phase2.method]
        # A batch is sent when all its requests are there, so none may wait for another to be answered.
        self.decode_slots = Limiter(1 << 30 if judge.runtime.batch.enabled else judge.runtime.concurrency + 4)
        self._begun: set[int] = set()  # groups
        self._ahead: dict[tuple[int, int], asyncio.Task[_Phase1]] = {}  # by group and candidate
        self._sources: dict[int, asyncio.Task[EncodedImage]] = {}  # of the groups whose candidates are ahead
        self._waiting = 0  # bytes of candidates that are ahead and not judged yet

    def look_ahead(self, ahead: Ahead, tasks: asyncio.TaskGroup) -> None:
        """Begin phase 1 of candidates whose group is not committed yet, unless too many wait."""
        late = ahead.group in self._begun or self.judge.runtime.batch.enabled  # a batch is of all candidates
        if late or self._waiting + ahead.stacks.nbytes > MOST_BYTES:
            return
        if ahead.group not in self._sources:
            self._sources[ahead.group] = tasks.create_task(self._encoded(ahead.image))
        source = self._sources[ahead.group]
        for candidate in range(ahead.first, ahead.first + len(ahead.stacks)):
            self._ahead[ahead.group, candidate] = tasks.create_task(self._ask_ahead(ahead, candidate, source))

    async def score(self, group: Group) -> ScoredGroup:
        """Both phases of one group. Failures are masks; LayerloopError only if the judge is gone."""
        self._begun.add(group.record.group)
        self._sources.pop(group.record.group, None)
        image = await asyncio.to_thread(group.image)
        source = await self._encoded(image)
        judgements = [Judgement(candidate) for candidate in group.candidates]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._judge_phase1(image, source, judgement)) for judgement in judgements]
        positions: list[tuple[int, float]] = []
        if self.recipe.phase2.enabled and enough_valid(judgements, self.recipe):
            shown = _ShownGroup(group.record, source, [task.result() for task in running])
            positions = await self._judge_phase2(shown, judgements)
        rows = score_rows(group.record, judgements, self.rubric, self.recipe)
        return ScoredGroup(rows, not enough_valid(judgements, self.recipe), positions)

    # ---------------------------------------------------------------------------------------------------------- phase 1

    async def _judge_phase1(self, image: Pixels, source: EncodedImage, judgement: Judgement) -> Pixels | None:
        """Fill in `penalty`, `samples` and `phase1`, or `reason`. Returns the candidate's cells for phase 2."""
        candidate = judgement.candidate
        record = candidate.record
        found: _Phase1 | None = None
        if (ahead := self._ahead.pop((record.group, record.candidate), None)) is not None:
            found = await ahead
            committed = await asyncio.to_thread(lambda: pixels_sha256(image, candidate.stack()))
            if found.pixels_sha256 != committed:  # another attempt at the group was faster
                found = None
        if found is None:
            label = candidate_key(record.iteration, record.group, record.candidate)
            found = await self._ask_phase1(image, candidate.stack, source, label)
        judgement.penalty = found.penalty
        judgement.samples = [answer[0][0] for answer in found.answers if not isinstance(answer, UnusableError)]
        if judgement.samples:
            judgement.phase1 = self.phase1.combine(judgement.samples, self.rubric.names)
        else:
            judgement.reason = f"phase1: {found.answers[0]}"
        return found.cells

    async def _ask_phase1(
        self, image: Pixels, stack: Callable[[], Pixels], source: EncodedImage, label: str
    ) -> _Phase1:
        """Phase 1 of a candidate whose layers `stack` reads, in a thread."""
        async with self.decode_slots.slot(LAST):
            prepared = await asyncio.to_thread(lambda: prepare(image, stack(), self.recipe))
            request = self.phase1.request(self.rubric, source, prepared.images, self.recipe, label=label)
            answers = await _all(
                _or_unusable(self.judge.ask(request, sample=sample, priority=LAST, refusals=REFUSALS))
                for sample in range(self.recipe.samples)
            )
        return _Phase1(answers, prepared.penalty, prepared.cells)

    async def _ask_ahead(self, ahead: Ahead, candidate: int, source: asyncio.Task[EncodedImage]) -> _Phase1:
        """Phase 1 of a candidate of a group that is not committed."""
        stack, label = ahead.stacks[candidate - ahead.first], candidate_key(ahead.iteration, ahead.group, candidate)
        self._waiting += stack.nbytes
        try:
            sha256 = await asyncio.to_thread(pixels_sha256, ahead.image, stack)
            found = await self._ask_phase1(ahead.image, lambda: stack, await source, label)
        finally:
            self._waiting -= stack.nbytes
        return replace(found, pixels_sha256=sha256)

    async def _encoded(self, image: Pixels) -> EncodedImage:
        """A source as the judge is shown it."""
        return await asyncio.to_thread(lambda: encode_image(fitted(image, self.recipe.resolution)))

    # ---------------------------------------------------------------------------------------------------------- phase 2

    async def _judge_phase2(self, shown: _ShownGroup, judgements: Sequence[Judgement]) -> list[tuple[int, float]]:
        """Fill in `phase2` and `repeats`; a candidate that no grid judged is masked. Returns position observations."""
        valid = [index for index, j in enumerate(judgements) if j.reason is None]
        layers, height, width = next(cells.shape[:3] for cells in shown.cells if cells is not None)
        tasks: list[Coroutine[Any, Any, list[_Answer]]] = []
        for repeat in range(self.recipe.phase2.repeats):
            rng = random.Random(seed_for(self.seed, shown.record.iteration, shown.record.image_key, "phase2", repeat))
            orders = self.phase2.plan(valid, (layers, height, width), self.recipe.phase2, rng)
            for number, order in enumerate(orders):
                grid = Grid(repeat, number, tuple(order))
                tasks.append(self._judge_grid(shown, judgements, grid, grids=len(orders)))
        answers = [answer for answers in await _all(tasks) for answer in answers]
        grids = [answer for answer in answers if not isinstance(answer, UnusableError)]
        failed = next((answer for answer in answers if isinstance(answer, UnusableError)), None)
        self._combine(judgements, valid, grids, failed)
        return [observation for grid in grids for observation in self._positions(grid)]

    async def _judge_grid(
        self, shown: _ShownGroup, judgements: Sequence[Judgement], grid: Grid, *, grids: int
    ) -> list[_Answer]:
        """The scores of a grid of the repeat's `grids`, or why it has none and those of what was asked in its place."""
        names = (self.seed, shown.record.iteration, shown.record.image_key, "phase2", grid.repeat, grid.number, "again")
        rng = random.Random(seed_for(*names))
        tries = follow_ups(grid, grids=grids, overlap=self.recipe.phase2.overlap, rng=rng)
        async with self.decode_slots.slot(FIRST):
            request = await self._grid_request(shown, judgements, grid)
            before = await self.judge.recall(request, sample=grid.repeat)
            if isinstance(before, UnusableError) and (stored := await self._stored(shown, judgements, tries)):
                tries = [stored]  # an attempt of the step before this one has paid for it
            else:
                answer = await self._ask(request, grid)
                if not isinstance(answer, UnusableError):
                    return [answer]
                before = answer
            self.judge.statistics.followed_up += 1
            for following in tries:
                answers = await _all(self._ask_following(shown, judgements, part) for part in following)
                if any(not isinstance(answer, UnusableError) for answer in answers):
                    break
        return [before, *answers]

    async def _stored(
        self, shown: _ShownGroup, judgements: Sequence[Judgement], tries: Sequence[list[Grid]]
    ) -> list[Grid] | None:
        """The first of some tries whose grids all have a stored answer."""
        for following in tries:
            requests = [await self._grid_request(shown, judgements, grid) for grid in following]
            replies = [await self.judge.recall(request, sample=following[0].repeat) for request in requests]
            if all(isinstance(reply, list) for reply in replies):
                return following
        return None

    async def _ask_following(self, shown: _ShownGroup, judgements: Sequence[Judgement], grid: Grid) -> _Answer:
        return await self._ask(await self._grid_request(shown, judgements, grid), grid)

    async def _ask(self, request: Request, grid: Grid) -> _Answer:
        answer = await _or_unusable(self.judge.ask(request, sample=grid.repeat, priority=FIRST))
        if isinstance(answer, UnusableError):
            return answer
        return [
            GridScore(grid.repeat, grid.number, position, candidate, scores)
            for position, (candidate, scores) in enumerate(zip(grid.order, answer[0], strict=True))
        ]

    async def _grid_request(self, shown: _ShownGroup, judgements: Sequence[Judgement], grid: Grid) -> Request:
        record = shown.record
        stacks = [cells for index in grid.order if (cells := shown.cells[index]) is not None]
        drawn: dict[str, EncodedImage] = await asyncio.to_thread(
            lambda: {name: draw_grid(stacks, name) for name in self.recipe.backdrops}
        )
        return self.phase2.request(
            self.rubric,
            shown.source,
            drawn,
            self.recipe,
            phase1=[scores for index in grid.order if (scores := judgements[index].phase1) is not None],
            layers=record.layers,
            label=f"{group_key(record.iteration, record.group)} repeat {grid.repeat} grid {grid.number}",
        )

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


async def _all(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; an exception cancels the rest."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(question) for question in asked]
    return [task.result() for task in running]


async def _or_unusable(asked: Awaitable[T]) -> T | UnusableError:
    """The result, or the UnusableError in its place."""
    try:
        return await asked
    except UnusableError as error:
        return error
