"""Paired differences and their bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from layerloop.components.evaluate_adapter.statistics import Comparison, compare


def test_means_and_difference_are_those_of_the_pairs() -> None:
    found = compare([1.0, 2.0, 3.0], [2.0, 2.0, 5.0], resamples=1000, seed=1)
    assert (found.base, found.tuned, found.difference, found.n) == (2.0, 3.0, 1.0, 3)


def test_a_constant_difference_has_a_point_for_an_interval() -> None:
    base = [0.1, 0.5, 0.9, 0.2, 0.4, 0.3, 0.8, 0.7]
    found = compare(base, [value + 0.1 for value in base], resamples=500, seed=1)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.clear


def test_few_pairs_are_never_clear() -> None:
    assert not compare([0.0] * 7, [1.0] * 7, resamples=200, seed=1).clear
    assert compare([0.0] * 8, [1.0] * 8, resamples=200, seed=1).clear


def test_pairing_removes_what_pictures_have_in_common() -> None:
    """Difficulty varies a hundred times more than the models differ, and the difference is still clear."""
    draw = np.random.default_rng(0)
    difficulty = draw.normal(0, 1, 40)
    tuned = difficulty - 0.01 + draw.normal(0, 0.005, 40)
    found = compare(difficulty.tolist(), tuned.tolist(), resamples=2000, seed=1)
    assert found.clear and found.high is not None and found.high < 0


def test_noise_around_zero_is_not_clear() -> None:
    draw = np.random.default_rng(3)
    base = draw.normal(0, 1, 40)
    assert not compare(base.tolist(), (base + draw.normal(0, 1, 40)).tolist(), resamples=2000, seed=1).clear


def test_intervals_cover_the_true_difference_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        differences = draw.normal(0.3, 1, 30)
        found = compare([0.0] * 30, differences.tolist(), resamples=400, seed=trial)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.89 <= covered / 300 <= 0.98


def test_pairs_with_an_undefined_side_are_left_out() -> None:
    found = compare([1.0, None, 3.0, 4.0], [2.0, 5.0, None, 6.0], resamples=200, seed=1)
    assert (found.base, found.tuned, found.difference, found.n) == (2.5, 4.0, 1.5, 2)


def test_without_pairs_there_are_no_numbers() -> None:
    assert compare([None], [1.0], resamples=200, seed=1) == Comparison(None, None, None, None, None, 0)


def test_one_pair_has_a_difference_and_no_interval() -> None:
    found = compare([1.0], [3.0], resamples=200, seed=1)
    assert (found.difference, found.low, found.high, found.clear) == (2.0, None, None, False)


def test_the_same_seed_gives_the_same_interval() -> None:
    base, tuned = np.random.default_rng(0).normal(0, 1, (2, 20)).tolist()
    assert compare(base, tuned, resamples=300, seed=5) == compare(base, tuned, resamples=300, seed=5)
    assert compare(base, tuned, resamples=300, seed=5) != compare(base, tuned, resamples=300, seed=6)
