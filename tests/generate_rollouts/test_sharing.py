"""Which rank samples what."""

from __future__ import annotations

from layerloop.components.generate_rollouts.plan import plan_iteration
from layerloop.components.generate_rollouts.sharing import Batch, Shares, share_batches
from layerloop.components.schema.recipe import Recipe


def shares(ranks: int, batch_size: int, **rollout: object) -> Shares:
    section = {"groups": 3, "group_size": 5, "steps": 4, "window": {"size": 2, "start": 1}, "min_layers": 2,
               "max_layers": 2} | rollout  # fmt: skip
    recipe = Recipe.model_validate({"name": "test", "rollout": section})
    plans = plan_iteration(recipe, 1, 3)
    tokens = {0: 100, 1: 100, 2: 50}
    return share_batches(plans, tokens, recipe.rollout, width=64, batch_size=batch_size, ranks=ranks)


def all_batches(found: Shares) -> set[Batch]:
    return {batch for mine in found.batches for batch in mine}


def test_batches_do_not_depend_on_the_ranks() -> None:
    one, three = shares(1, 2), shares(3, 2)
    assert all_batches(one) == all_batches(three) and sum(map(len, three.batches)) == 9
    assert {len(batch.candidates) for batch in all_batches(one)} == {1, 2}


def test_a_group_is_written_by_a_rank_that_samples_of_it() -> None:
    found = shares(3, 1)
    for group, rank in found.writers.items():
        assert any(batch.group == group for batch in found.batches[rank])
    assert set(found.writers) == {0, 1, 2}


def test_a_rank_samples_group_by_group_and_first_what_keeps_the_judge_busy() -> None:
    (mine,) = shares(1, 2).batches
    assert [batch.group for batch in mine] == [2] * 3 + [0] * 3 + [1] * 3, "group 2 is of a small image"
    for of_rank in shares(2, 1).batches:
        groups = [batch.group for batch in of_rank]
        assert groups == sorted(groups, key=[2, 0, 1].index)
        for group in set(groups):
            starts = [batch.candidates.start for batch in of_rank if batch.group == group]
            assert starts == sorted(starts)


def test_a_group_that_shares_its_prefix_stays_whole() -> None:
    found = shares(2, 2, share_prefix=True)
    assert {len(batch.candidates) for batch in all_batches(found)} == {5}
    calls = 1 * 2 + 3 * (2 + 1)  # the prefix once, then three batches of two stochastic steps and the last
    assert sorted(found.calls) == [calls, 2 * calls]
