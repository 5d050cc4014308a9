"""Group-relative advantages in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.update_lora.advantages import advantages_of, normalise


def row(group: int, candidate: int, reward: float | None, **more: object) -> ScoreRow:
    fields: dict[str, object] = {
        "iteration": 1,
        "group": group,
        "candidate": candidate,
        "image_key": f"image{group}",
        "layers": 2 + group % 3,
        "reward": reward,
        "reason": None if reward is not None else "judge timed out",
        "phase1": None,
        "phase2": None,
        "judge": "rules",
        "rubric": "default",
        "rubric_sha256": "0" * 64,
    }
    return ScoreRow.model_validate(fields | more)


def rows(*groups: list[float | None]) -> list[ScoreRow]:
    return [row(g, c, reward) for g, rewards in enumerate(groups) for c, reward in enumerate(rewards)]


def test_advantages_of_a_group_sum_to_zero_and_have_deviation_std_over_std_plus_epsilon() -> None:
    rewards = np.array([0.62, 0.78, 0.70, 0.66, 0.74, 0.70, 0.64, 0.76])
    std = rewards.std(ddof=0)

    advantages = normalise(rewards, epsilon=1e-4, clip=5.0)

    assert abs(advantages.sum()) < 1e-12
    assert advantages.std() == pytest.approx(std / (std + 1e-4), rel=1e-12)


def test_the_deviation_is_that_of_the_population() -> None:
    # Rewards with population deviation exactly 0.02: std(A) = 0.02 / 0.0201; with ddof 1 it would be 0.963 for G = 16.
    rewards = 0.5 + 0.02 * np.array([1.0, -1.0] * 8)
    assert normalise(rewards, epsilon=1e-4, clip=5.0).std() == pytest.approx(0.9950249, abs=1e-6)


def test_advantages_are_clipped() -> None:
    rewards = np.array([1.0] + [0.0] * 63)  # the lone winner lies 7.9 deviations above the mean
    assert normalise(rewards, epsilon=0.0, clip=5.0).max() == 5.0


def test_groups_are_keyed_by_group_and_not_by_what_they_share() -> None:
    """One prompt for every image: pooled statistics would give group 0 only negative advantages."""
    advantages = advantages_of(rows([0.1, 0.2], [0.8, 0.9]), UpdateRecipe())
    assert [group.group for group in advantages.groups] == [0, 1]
    for group in advantages.groups:
        assert group.advantages == pytest.approx((-0.998004, 0.998004), abs=1e-6)


@pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [12, 24])
def test_identical_rewards_are_filtered_although_their_deviation_is_not_exactly_zero(reward: float, size: int) -> None:
    advantages = advantages_of(rows([reward] * size, [0.1, 0.9]), UpdateRecipe(min_reward_std=1e-12))
    assert advantages.zero_std_groups == (0,)
    assert [group.group for group in advantages.groups] == [1]
    assert advantages.filtered_fraction == 0.5
    assert np.abs(normalise(np.full(size, reward), epsilon=1e-4, clip=5.0)).max() <= 1e-11


def test_a_masked_candidate_is_left_out_and_never_counted_as_zero() -> None:
    true = [0.62, 0.65, 0.68, 0.70, 0.72, 0.75, 0.78]
    masked = advantages_of(rows([*true, None]), UpdateRecipe())
    alone = advantages_of(rows(true), UpdateRecipe())
    assert masked.masked == 1
    assert masked.groups == alone.groups
    spoilt = advantages_of(rows([*true, 0.0]), UpdateRecipe()).groups[0].advantages
    assert min(spoilt[:7]) > 0, "a false zero would have made every real sample look good"


def test_a_group_with_one_valid_candidate_teaches_nothing() -> None:
    advantages = advantages_of(rows([0.5, None, None], [None, None, None]), UpdateRecipe())
    assert advantages.groups == ()
    assert advantages.underfilled_groups == (0, 1)
    assert advantages.filtered_fraction == 1.0


def test_a_groups_weight_is_that_of_its_points_and_leaves_its_advantages_alone() -> None:
    weighted = [row(g, c, r, weight=w) for g, w in enumerate((1.0, 0.25)) for c, r in enumerate((0.1, 0.5, 0.9))]
    full, doubted = advantages_of(weighted, UpdateRecipe()).groups
    assert (full.weight, doubted.weight) == (1.0, 0.25)
    assert doubted.advantages == full.advantages


def test_a_group_of_weight_zero_is_filtered_as_such() -> None:
    """The judge's own spread explains all of its rewards; two valid candidates it has."""
    scored = [row(0, c, r, weight=0.0) for c, r in enumerate((0.1, 0.9))] + rows([], [0.2, 0.4], [0.3])
    advantages = advantages_of(scored, UpdateRecipe())
    assert [group.group for group in advantages.groups] == [1]
    assert (advantages.zero_weight_groups, advantages.underfilled_groups, advantages.zero_std_groups) == (
        (0,),
        (2,),
        (),
    )
    assert advantages.filtered_groups == 2


def test_two_weights_in_one_group_are_refused() -> None:
    with pytest.raises(
        LayerloopError, match=r"candidates 0 and 1 of group 0 have weights 1\.0 and 0\.5: a group has one"
    ):
        advantages_of([row(0, 0, 0.1), row(0, 1, 0.2, weight=0.5)], UpdateRecipe())


@pytest.mark.parametrize("weight", [math.nan, -0.5])
def test_a_weight_that_cannot_be_one_is_refused(weight: float) -> None:
    bad = row(0, 1, 0.2).model_copy(update={"weight": weight})
    with pytest.raises(LayerloopError, match=f"weight of candidate 1 of group 0 is {weight}"):
        advantages_of([row(0, 0, 0.1), bad], UpdateRecipe())


def test_order_of_the_rows_changes_nothing() -> None:
    some = rows([0.1, 0.5, 0.3], [0.2, 0.9, 0.4])
    assert advantages_of(some, UpdateRecipe()) == advantages_of(reversed(some), UpdateRecipe())


def test_a_candidate_judged_twice_is_refused() -> None:
    with pytest.raises(LayerloopError, match="candidate 1 of group 0 twice"):
        advantages_of([row(0, 0, 0.1), row(0, 1, 0.2), row(0, 1, 0.3)], UpdateRecipe())


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    bad = row(0, 1, 0.2).model_copy(update={"reward": reward})
    with pytest.raises(LayerloopError, match=f"reward of candidate 1 of group 0 is {reward}"):
        advantages_of([row(0, 0, 0.1), bad], UpdateRecipe())
