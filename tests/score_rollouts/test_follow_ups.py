"""No group is lost to one answer: what is asked in the place of a grid without one, and after a judge's bad phase."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.score_rollouts.follow_ups import Grid, follow_ups
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign

from .judges import MeddlingJudge, group_and_order, in_order, is_phase2, meddling_judge, rows_of

MakeCampaign = Callable[..., Campaign]
DECLINED, NO_ANSWER = "I'm sorry, but I can't assist with that request.", "They all look fine to me."


@pytest.fixture
def meddling() -> Iterator[MeddlingJudge]:
    with meddling_judge() as judge:
        yield judge


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("overlap", [1, 2, 11])
def test_follow_ups_show_all_candidates_again_and_their_halves_are_tied(count: int, overlap: int) -> None:
    grid = Grid(1, 2, tuple(range(10, 10 + count)))
    tries = follow_ups(grid, grids=3, overlap=overlap, rng=random.Random(4))
    assert tries == follow_ups(grid, grids=3, overlap=overlap, rng=random.Random(4))
    [again] = tries[0]
    assert (again.repeat, again.number) == (1, 2)
    assert again.order != grid.order and sorted(again.order) == sorted(grid.order)
    if count == 2:
        assert len(tries) == 1
        return
    shared = []
    for first, second in tries[1:]:
        shared.append(set(first.order) & set(second.order))
        assert set(first.order) | set(second.order) == set(grid.order)
        assert 1 <= len(shared[-1]) < len(first.order) == len(second.order) < count
        assert len(shared[-1]) >= min(overlap, count // 3)
        assert len({0, 1, 2, first.number, second.number}) == 5  # numbers that no other grid of the repeat has
    assert len(shared) == 2 and not shared[0] & shared[1]  # a candidate that the judge minds is in one half of a try


def test_halves_of_all_grids_of_a_repeat_have_numbers_of_their_own() -> None:
    order = tuple(range(5))
    numbers = [
        part.number
        for number in range(4)
        for part in follow_ups(Grid(0, number, order), grids=4, overlap=2, rng=random.Random(0))[1]
    ]
    assert len({*numbers, *range(4)}) == 12


def fate(body: dict[str, Any], seed: int) -> float:
    """A number in [0, 1) that follows from the request, so that the order of requests decides nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {json.dumps(body)}".encode()).digest()[:4]) / 2**32


def test_with_a_tenth_unusable_and_two_percent_refused_under_one_percent_is_lost(
    make_campaign: MakeCampaign, meddling: MeddlingJudge
) -> None:
    """What happens to a request follows from it, and nothing from the order in which requests arrive."""
    campaign = make_campaign(groups=10, size=12, canaries=False)
    asked: Counter[str] = Counter()
    first: set[int | None] = {0, 1}  # groups whose first grid is refused

    def faulty(body: dict[str, Any], number: int, text: str) -> str:
        luck = fate(body, 3)
        group = group_and_order(body, campaign)[0] if is_phase2(body) else None
        if luck < 0.02 or group in first:
            first.discard(group)
            asked["refused"] += 1
            return DECLINED
        asked["unusable"] += luck < 0.12
        return NO_ANSWER if luck < 0.12 else text

    meddling.change = faulty
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    lost = sum(row.reward is None for row in rows_of(campaign))
    assert lost < 0.01 * 120 and asked["unusable"] >= 5 and asked["refused"] >= 3
    assert result.metrics["judge_grids_followed_up"] >= 2
    assert in_order(rows_of(campaign))


@pytest.mark.parametrize("minded", [3, 5])
def test_a_grid_is_asked_in_another_order_then_in_halves_and_one_candidate_does_not_lose_the_others(
    make_campaign: MakeCampaign, meddling: MeddlingJudge, minded: int
) -> None:
    campaign = make_campaign(groups=1, size=6, canaries=False)
    seen: list[list[int]] = []

    def against(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        seen.append(group_and_order(body, campaign)[1])
        return DECLINED if minded in seen[-1] else text

    meddling.change = against
    run(campaign=campaign.uri, judge_url=meddling.url)
    assert [len(order) for order in seen[:4]] == [6, 6, 4, 4] and seen[0] != seen[1]
    assert len(seen) == (6 if minded in seen[2] and minded in seen[3] else 4)
    [saved] = [set(order) for order in seen if minded not in order]
    rows = rows_of(campaign)
    assert {row.candidate for row in rows if row.reward is not None} == saved and len(saved) == 4
    assert all((row.reason or "").startswith("phase2: refused") for row in rows if row.candidate not in saved)


def test_after_a_kill_a_follow_up_that_was_paid_is_taken_and_its_grid_not_asked_again(
    make_campaign: MakeCampaign, meddling: MeddlingJudge
) -> None:
    campaign = make_campaign(groups=2, size=4, canaries=False, concurrency=1)
    grids: Counter[int] = Counter()

    def refuse_first(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        group = group_and_order(body, campaign)[0]
        grids[group] += 1
        return DECLINED if grids[group] == 1 else text

    meddling.change = refuse_first
    first = run(campaign=campaign.uri, judge_url=meddling.url)
    rewards = [row.reward for row in rows_of(campaign)]
    assert grids == {0: 2, 1: 2} and first.metrics["judge_requests"] == 8 + 4
    for name in campaign.store.list(f"{campaign.scores_dir(1)}/"):  # as a kill before the commit leaves it
        if "/replies/" not in name:
            campaign.store.delete(name)
    again = run(campaign=campaign.uri, judge_url=meddling.url)
    assert again.metrics["judge_requests"] == 0 and [row.reward for row in rows_of(campaign)] == rewards


def test_after_a_bad_phase_a_healthy_judge_gets_the_iteration_through(
    make_campaign: MakeCampaign, meddling: MeddlingJudge
) -> None:
    """Nothing is deleted by hand, no good reply is asked twice, and every attempt asks a bounded number of times."""
    campaign = make_campaign(groups=3, size=4, canaries=False, redraws=1)
    bodies: Counter[str] = Counter()
    good: set[str] = set()
    healthy = False

    def phase(body: dict[str, Any], number: int, text: str) -> str:
        what = json.dumps(body["messages"])
        bodies[what] += 1
        if healthy or fate(body, 1) < 0.1:
            assert what not in good, "a good reply was asked for twice"
            good.add(what)
            return text
        return NO_ANSWER

    meddling.change = phase
    for attempt in (1, 2):
        with pytest.raises(LayerloopError, match="run the step again: what was unusable is asked again"):
            run(campaign=campaign.uri, judge_url=meddling.url)
        assert max(bodies.values()) == 2 * attempt
    healthy = True
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    assert all(row.reason is None for row in rows_of(campaign)) and result.metrics["groups_dropped"] == 0
    assert in_order(rows_of(campaign)) and max(bodies.values()) <= 5
