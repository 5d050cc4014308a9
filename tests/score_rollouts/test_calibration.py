"""The arithmetic of scores by closed form."""

from __future__ import annotations

import math
import random

import pytest

from layerloop.components.score_rollouts.calibration import (
    aggregate,
    position_share,
    reliability,
    std_over_repeats,
)


@pytest.mark.parametrize("how", ["mean", "log"])
def test_aggregation_goes_from_zero_to_one_and_rises_with_every_criterion(how: str) -> None:
    weights = {"a": 0.25, "b": 0.75}
    assert aggregate({"a": 0, "b": 0}, weights, how) == 0  # type: ignore[arg-type]
    assert aggregate({"a": 1, "b": 1}, weights, how) == pytest.approx(1)  # type: ignore[arg-type]
    values = [aggregate({"a": q / 10, "b": 0.5}, weights, how) for q in range(11)]  # type: ignore[arg-type]
    assert values == sorted(values) and len(set(values)) == 11


def test_the_log_form_pays_more_for_the_criterion_that_is_behind() -> None:
    weights = {"a": 0.5, "b": 0.5}
    start = aggregate({"a": 0.1, "b": 0.9}, weights, "log")
    behind = aggregate({"a": 0.2, "b": 0.9}, weights, "log") - start
    ahead = aggregate({"a": 0.1, "b": 1.0}, weights, "log") - start
    assert behind > 2 * ahead
    assert aggregate({"a": 0.5, "b": 0.5}, weights, "log") == pytest.approx(math.log(3) / math.log(5))


def test_spread_needs_two() -> None:
    assert std_over_repeats([0.5]) is None and std_over_repeats([]) is None
    assert std_over_repeats([0.4, 0.6]) == pytest.approx(math.sqrt(0.02))


def test_reliability_is_the_share_of_variance_that_is_not_the_judges() -> None:
    rewards = [0.2, 0.4, 0.6, 0.8]  # variance 0.0667
    assert reliability(rewards, [0.0] * 4, 2) == 1.0
    assert reliability(rewards, [0.2] * 4, 2) == pytest.approx(1 - 0.02 / (0.2 / 3))
    assert reliability(rewards, [1.0] * 4, 2) == 0.0
    assert reliability(rewards, [None] * 4, 1) == 1.0
    assert reliability([0.5, 0.5], [0.0, 0.0], 2) == 0.0


def test_position_share_sees_order_bias_and_only_that() -> None:
    rng = random.Random(0)
    fair = [(p, rng.gauss(0, 1)) for _ in range(200) for p in range(6)]
    biased = [(p, value + 0.5 * p) for p, value in fair]
    raw, beyond_chance = position_share(fair)
    assert raw < 0.02 and beyond_chance < 0.01
    assert position_share(biased)[1] > 0.3
    assert position_share([(p, float(p)) for _ in range(3) for p in range(4)]) == pytest.approx((1.0, 1.0))
    assert position_share([]) == (0.0, 0.0)


def test_position_share_is_eta_squared_and_epsilon_squared() -> None:
    # Positions 0 and 1 have means 1 and 3: between 4 * 1 = 4, within 2 * (0.5^2 + 0.5^2) = 1, 2 degrees of freedom.
    observations = [(0, 0.5), (0, 1.5), (1, 2.5), (1, 3.5)]
    assert position_share(observations) == pytest.approx((4 / 5, (4 - 1 * (1 / 2)) / 5))
