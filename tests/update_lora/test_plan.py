"""How groups become optimizer steps, forward passes and work of ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from layerloop.components.update_lora.advantages import GroupAdvantage
from layerloop.components.update_lora.plan import OptimizerStep, candidates_of, plan_steps


def groups(count: int, candidates: int = 3) -> list[GroupAdvantage]:
    return [
        GroupAdvantage(
            group=2 * g,
            layers=2 + g % 4,
            candidates=tuple(range(candidates)),
            advantages=tuple(float(c) for c in range(candidates)),
        )
        for g in range(count)
    ]


def points(steps: tuple[OptimizerStep, ...]) -> Counter[tuple[int, int, int]]:
    return Counter(
        (batch.group, point.candidate, point.timestep)
        for step in steps
        for rank in step.ranks
        for batch in rank
        for point in batch.points
        if point.weight > 0
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatch", [1, 4, 100])
@pytest.mark.parametrize("pad", [False, True])
def test_every_point_is_learned_from_once(ranks: int, microbatch: int, pad: bool) -> None:
    steps = plan_steps(groups(5), steps=2, timesteps=4, microbatch=microbatch, ranks=ranks, pad=pad)
    every = Counter((2 * g, c, t) for g in range(5) for c in range(3) for t in range(4))
    assert points(steps) == every
    assert sum(step.total_weight for step in steps) == 60
    for step in steps:
        assert all(len(batch.points) <= microbatch for rank in step.ranks for batch in rank)
        if pad:
            assert len({len(rank) for rank in step.ranks}) == 1, "ranks of a sharded model must stay in step"


def test_what_is_divided_by_does_not_depend_on_microbatches_or_ranks() -> None:
    totals = {
        tuple(
            step.total_weight for step in plan_steps(groups(5), steps=2, timesteps=4, microbatch=m, ranks=r, pad=True)
        )
        for m in (1, 7, 50)
        for r in (1, 2, 4)
    }
    assert totals == {(36.0, 24.0)}


def test_groups_are_split_among_steps_the_same_way_every_time() -> None:
    steps = plan_steps(groups(5), steps=2, timesteps=1, microbatch=10, ranks=1, pad=False)
    assert [[batch.group for batch in step.ranks[0]] for step in steps] == [[0, 4, 8], [2, 6]]


def test_fewer_groups_than_steps_give_fewer_steps() -> None:
    assert len(plan_steps(groups(1), steps=4, timesteps=1, microbatch=10, ranks=1, pad=False)) == 1
    assert plan_steps([], steps=4, timesteps=1, microbatch=10, ranks=1, pad=False) == ()


def test_passes_of_a_group_are_of_nearly_equal_size() -> None:
    (step,) = plan_steps(groups(1, candidates=9), steps=1, timesteps=4, microbatch=16, ranks=1, pad=False)
    assert [len(batch.points) for batch in step.ranks[0]] == [12, 12, 12]


def test_microbatches_go_to_the_least_loaded_rank_the_longest_first() -> None:
    """One group of nine layers costs more than five of one layer: dealt in turn the first rank would have three."""
    mixed = [GroupAdvantage(g, 9 if g == 0 else 1, (0,), (1.0,)) for g in range(6)]
    (step,) = plan_steps(mixed, steps=1, timesteps=1, microbatch=1, ranks=2, pad=False)
    assert [[batch.group for batch in rank] for rank in step.ranks] == [[0], [1, 2, 3, 4, 5]]
    loads = [sum(batch.cost for batch in rank) for rank in step.ranks]
    assert loads[0] > loads[1] > 0.8 * loads[0]


def test_the_points_of_a_candidate_stay_on_one_rank() -> None:
    steps = plan_steps(groups(5), steps=2, timesteps=4, microbatch=1, ranks=3, pad=False)
    owners = [{(g, c) for g, mine in candidates_of(steps, rank).items() for c in mine} for rank in range(3)]
    assert sum(map(len, owners)) == len(set().union(*owners)), "each candidate's latents are needed once"
    for step in steps:
        loads = [sum(batch.cost for batch in rank) for rank in step.ranks]
        assert max(loads) < 1.35 * sum(loads) / 3, "of a few candidates each"


def test_a_rank_reads_the_candidates_of_its_own_microbatches() -> None:
    steps = plan_steps(groups(4), steps=2, timesteps=2, microbatch=2, ranks=2, pad=False)
    halves = [candidates_of(steps, rank) for rank in range(2)]
    assert all(half and len(half) < 12 for half in halves)
    for step in steps:
        for rank, batches in enumerate(step.ranks):
            assert all(point.candidate in halves[rank][batch.group] for batch in batches for point in batch.points)
    assert sum(len(half[g]) for half in halves for g in half) == 12, "a candidate is in one pass here, on one rank"


def test_padding_is_a_pass_of_points_of_weight_zero() -> None:
    """Three passes on two ranks: the rank with one gets a copy that counts for nothing."""
    uneven = [GroupAdvantage(0, 2, (0, 1), (1.0, -1.0), 0.5), GroupAdvantage(1, 2, (0,), (2.0,), 0.5)]
    (step,) = plan_steps(uneven, steps=1, timesteps=1, microbatch=1, ranks=2, pad=True)
    padding = [batch for rank in step.ranks for batch in rank if all(point.weight == 0 for point in batch.points)]
    assert [len(rank) for rank in step.ranks] == [2, 2] and len(padding) == 1
    assert padding[0].points[0].advantage == 0
    assert step.total_weight == 1.5
