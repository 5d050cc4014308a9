"""The arithmetic of scores by closed form."""

from __future__ import annotations

import math
import random

import pytest

from layerloop.components.score_rollouts.calibration import (
    Sighting,
    aggregate,
    merge,
    position_share,
    reliability,
    spread,
    win_rates,
)

NAMES = ("a", "b")


def grid(repeat: int, number: int, scores: dict[int, float], offset: float = 0.0) -> list[Sighting]:
    return [
        Sighting(repeat, number, position, candidate, {"a": value + offset, "b": 0.5})
        for position, (candidate, value) in enumerate(scores.items())
    ]


def test_one_grid_is_taken_as_it_is() -> None:
    merged = merge(grid(0, 0, {2: 0.2, 0: 0.9, 1: 0.5}), NAMES)
    assert {c: s["a"] for c, s in merged.items()} == pytest.approx({0: 0.9, 1: 0.5, 2: 0.2}, abs=1e-3)


def test_repeats_of_the_same_candidates_are_averaged() -> None:
    merged = merge(grid(0, 0, {0: 0.2, 1: 0.6}) + grid(1, 0, {1: 0.8, 0: 0.4}), NAMES)
    assert {c: s["a"] for c, s in merged.items()} == pytest.approx({0: 0.3, 1: 0.7}, abs=1e-3)


def test_overlapping_grids_of_different_level_are_put_on_one_scale() -> None:
    truth = {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.6, 4: 0.7}
    first = grid(0, 0, {c: truth[c] for c in (0, 1, 2)}, offset=0.1)
    second = grid(0, 1, {c: truth[c] for c in (2, 3, 4)}, offset=-0.1)
    merged = merge(first + second, NAMES)
    differences = [merged[c + 1]["a"] - merged[c]["a"] for c in range(4)]
    assert differences == pytest.approx([0.1] * 4, abs=2e-3)
    assert sum(s["a"] for s in merged.values()) / 5 == pytest.approx(0.5, abs=0.02)


def test_nothing_seen_is_nothing_merged() -> None:
    assert merge([], NAMES) == {}


def test_win_rates_are_mean_shares() -> None:
    def duel(first: int, second: int, share: float) -> list[Sighting]:
        return [
            Sighting(0, 0, 0, first, {"a": share, "b": 0.5}),
            Sighting(0, 0, 1, second, {"a": 1 - share, "b": 0.5}),
        ]

    rates = win_rates([duel(0, 1, 1.0), duel(1, 2, 0.5), duel(2, 0, 0.0)], NAMES)
    assert {c: s["a"] for c, s in rates.items()} == {0: 1.0, 1: 0.25, 2: 0.25}


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
    assert spread([0.5]) is None and spread([]) is None
    assert spread([0.4, 0.6]) == pytest.approx(math.sqrt(0.02))


def test_reliability_is_the_share_of_variance_that_is_no_doubt() -> None:
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
