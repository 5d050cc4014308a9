"""All groups of an iteration through the judge, several at a time, and the canaries with them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from layerloop.components.judge.canaries import CanaryReport, score_canaries
from layerloop.components.judge.client import Judge
from layerloop.components.runtime.progress import progress
from layerloop.components.schema.errors import LayerloopError, first_refusal
from layerloop.components.score_rollouts.ahead import Ahead, Arrivals
from layerloop.components.score_rollouts.scoring import ScoredGroup, Scorer
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.groups import Group
from layerloop.components.storage.rollouts import read_groups


@dataclass
class Judged:
    """Result of an iteration: groups in ascending order, and the canaries if the recipe has them."""

    groups: list[ScoredGroup] = field(default_factory=list)
    canaries: CanaryReport | None = None


def arriving_groups(campaign: Campaign, iteration: int, arrivals: Arrivals | None) -> Iterator[Group]:
    """All groups of an iteration with their layers, as they are committed, as long as `arrivals` is listened to.

    In batch mode none is given before all are there, because a phase is one batch.

    Raises:
        LayerloopError: some are missing, and there are no arrivals to come.
    """
    missing = set(range(campaign.recipe.rollout.groups))
    while missing:
        found = campaign.committed_groups(iteration, missing)
        if campaign.runtime.judge.batch.enabled and len(found) < len(missing):
            found = {}
        yield from read_groups(campaign.store, found, layers=True)
        missing -= found.keys()
        if missing and arrivals is None:
            raise LayerloopError("groups were deleted while their iteration was judged: run generate_rollouts again")
        if missing and arrivals is not None:
            arrivals.wait()
            if not arrivals.listening:  # the judge has failed
                return


async def judge_all(
    judge: Judge, scorer: Scorer, campaign: Campaign, iteration: int, arrivals: Arrivals | None
) -> Judged:
    """Judge all of an iteration's groups; they are read from their shards as slots become free.

    Args:
        arrivals: Of groups that may be missing, and of candidates ahead of them; without it all have to be there.

    Raises:
        LayerloopError: the judge cannot be reached, or is gone; replies until then are stored.
    """
    groups = arriving_groups(campaign, iteration, arrivals)
    judged = Judged()
    recipe, total = campaign.recipe.judge, campaign.recipe.rollout.groups
    ticks = progress(range(total), what="judging", unit="groups", total=total)
    next(ticks, None)
    slots = asyncio.Semaphore(_groups_at_once(campaign, total))

    async def one(group: Group) -> None:
        try:
            judged.groups.append(await scorer.score(group))
            next(ticks, None)
        finally:
            slots.release()

    async def canaries() -> None:
        judged.canaries = await score_canaries(judge, scorer.rubric, recipe)

    async with judge:
        await judge.check_reachable()
        try:
            with first_refusal():
                async with asyncio.TaskGroup() as tasks:
                    if arrivals is not None:
                        arrivals.listen(iteration, _into(asyncio.get_running_loop(), scorer, tasks))
                    if recipe.canaries:
                        tasks.create_task(canaries())
                    await slots.acquire()
                    while (group := await asyncio.to_thread(_next, groups)) is not None:
                        tasks.create_task(one(group))
                        await slots.acquire()
        finally:
            if arrivals is not None:
                arrivals.stop()
    judged.groups.sort(key=lambda group: group.rows[0].group)
    return judged


def _groups_at_once(campaign: Campaign, total: int) -> int:
    """Number of groups that keeps the judge busy: in phase 2 a group has one request in flight, not one per candidate.

    In batch mode all of them, because a phase is one batch; their layers are held as PNG.
    """
    if campaign.runtime.judge.batch.enabled:
        return max(1, total)
    return 3 * math.ceil(campaign.runtime.judge.concurrency / campaign.recipe.rollout.group_size) + 4


def _into(loop: asyncio.AbstractEventLoop, scorer: Scorer, tasks: asyncio.TaskGroup) -> Callable[[Ahead], None]:
    """Takes candidates from another thread."""

    def begin(ahead: Ahead) -> None:
        with contextlib.suppress(RuntimeError):  # the group of tasks is ending
            scorer.look_ahead(ahead, tasks)

    def take(ahead: Ahead) -> None:
        loop.call_soon_threadsafe(begin, ahead)

    return take


def _next(groups: Iterator[Group]) -> Group | None:
    return next(groups, None)
