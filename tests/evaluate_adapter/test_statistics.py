"""Paired differences: intervals and p-values that hold for few and skewed differences, and what is called clear."""

from __future__ import annotations

import numpy as np
import pytest

from layerloop.components.evaluate_adapter.statistics import (
    LEVEL,
    Comparison,
    Floats,
    compare,
    holm,
    intervals,
    p_values,
)


def test_means_and_difference_are_those_of_the_pairs() -> None:
    found = compare([1.0, 2.0, 3.0], [2.0, 2.0, 5.0], seed=1)
    assert (found.base, found.tuned, found.difference, found.n) == (2.0, 3.0, 1.0, 3)


def test_a_constant_difference_has_a_point_for_an_interval() -> None:
    base = [0.1, 0.5, 0.9, 0.2, 0.4, 0.3, 0.8, 0.7]
    found = compare(base, [value + 0.1 for value in base], seed=1)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert found.clear and found.p == pytest.approx(1 / 128)  # of 256 patterns of signs two are as far from 0


def test_few_pairs_are_never_clear() -> None:
    assert not compare([0.0] * 7, [1.0] * 7, seed=1).clear
    assert compare([0.0] * 8, [1.0] * 8, seed=1).clear


def test_pairing_removes_what_pictures_have_in_common() -> None:
    """Difficulty varies a hundred times more than the models differ, and the difference is still clear."""
    draw = np.random.default_rng(0)
    difficulty = draw.normal(0, 1, 40)
    tuned = difficulty - 0.01 + draw.normal(0, 0.005, 40)
    found = compare(difficulty.tolist(), tuned.tolist(), seed=1)
    assert found.clear and found.high is not None and found.high < 0


# ---------------------------------------------------------------------------------------------------- under a true null


def drawn(name: str, n: int, trials: int) -> Floats:
    """Differences `(trials, n)` of expectation 0."""
    draw = np.random.default_rng([n, len(name)])
    if name == "normal":
        return draw.normal(size=(trials, n))
    if name == "log-normal":
        return draw.lognormal(0, 0.5, (trials, n)) - np.exp(0.125)  # skewness 1.75
    return (draw.exponential(size=(trials, n)) - 1) * (-1 if name == "skewed to the left" else 1)  # skewness 2


@pytest.mark.parametrize("n", [8, 12, 24, 144])
@pytest.mark.parametrize("name", ["normal", "skewed to the right", "skewed to the left", "log-normal"])
def test_where_nothing_differs_at_most_six_in_a_hundred_are_clear(name: str, n: int) -> None:
    differences = drawn(name, n, trials=3000)
    low, high = intervals(differences, LEVEL)
    p = p_values(differences, seed=0, flips=999)
    clear = (p <= 1 - LEVEL) & ((low > 0) | (high < 0))
    assert 0.02 <= clear.mean() <= 0.06
    assert ((low > 0) | (high < 0)).mean() <= 0.07, "the interval alone covers 93 % or more"


@pytest.mark.parametrize("n", [8, 24])
def test_measures_of_few_values_are_not_clear_more_often(n: int) -> None:
    values = np.random.default_rng(n).choice([0, 0, 0, 0, 1 / 3, -1 / 3, 2 / 3, -2 / 3], (3000, n))
    assert (p_values(values, seed=0, flips=999) <= 1 - LEVEL).mean() <= 0.05


def test_a_real_difference_is_found() -> None:
    differences = np.random.default_rng(1).normal(0.6, 1, (400, 40))
    p = p_values(differences, seed=0, flips=999)
    assert (p <= 1 - LEVEL).mean() >= 0.9  # Student's test alone: 0.96


def test_a_large_difference_is_clear_whatever_its_skewness() -> None:
    """All of 18 images are worse by 0.3 to 0.9, most by 0.85: Hall's cubic is flat there and gave p = 0.02."""
    gaps = [0.85] * 5 + [0.9] * 5 + [0.8] * 4 + [0.7, 0.6, 0.4, 0.3]
    for sign in (1, -1):
        found = compare([0.0] * 18, [sign * gap for gap in gaps], seed=1)
        assert found.p is not None and found.p < 0.001


def test_few_discordant_images_of_many_are_not_clear() -> None:
    """4 of 480 differ, all one way: of the 16 patterns of their signs two are as far from 0."""
    found = compare([0.0] * 480, [1.0] * 4 + [0.0] * 476, seed=1)
    assert found.p == pytest.approx(0.125, abs=0.02) and not found.clear


def test_the_interval_is_students_where_there_is_no_skewness() -> None:
    differences = np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]]) + 3
    (low,), (high,) = intervals(differences, LEVEL)
    half = 2.7764451 * np.sqrt(0.625 / 5)  # the 97.5 % point of 4 degrees of freedom
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))


def test_the_interval_reaches_further_to_the_side_of_the_long_tail() -> None:
    differences = np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 5.0]])
    (low,), (high,) = intervals(differences, LEVEL)
    assert high - differences.mean() > 1.2 * (differences.mean() - low)


@pytest.mark.parametrize("tail", ["skewed to the right", "skewed to the left"])
def test_interval_and_p_value_agree_about_zero(tail: str) -> None:
    differences = drawn(tail, 30, trials=300) + 0.3
    low, high = intervals(differences, LEVEL)
    outside = (low > 0) | (high < 0)
    p = p_values(differences, seed=0)
    assert (outside >= (p <= 1 - LEVEL)).all(), "what the tests call clear, the interval does too"
    assert (outside == (p <= 1 - LEVEL)).mean() > 0.97  # the sign flips are a third opinion


def test_all_patterns_are_tried_of_few_and_drawn_patterns_are_close_to_them() -> None:
    differences = np.random.default_rng(2).normal(0.5, 1, (50, 14))
    exact = p_values(differences, seed=0)
    padded = np.concatenate([differences, np.zeros((50, 1))], axis=1)  # a zero changes no sum of any pattern
    assert np.abs(p_values(padded, seed=0) - exact).max() < 0.02
    assert (exact == p_values(differences, seed=99)).all()


# ------------------------------------------------------------------------------------------------------ many at a time


def of_p(p: float) -> Comparison:
    return Comparison(0.5, 0.4, -0.1, -0.2, -0.05, 20, p, p)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    adjusted = holm({"a": of_p(0.01), "b": of_p(0.04), "c": of_p(0.03), "d": Comparison(1, 1, 0, None, None, 1)})
    assert adjusted["d"].adjusted is None
    assert [adjusted[name].adjusted for name in "abc"] == [pytest.approx(p) for p in (0.03, 0.06, 0.06)]
    assert [adjusted[name].clear for name in "abcd"] == [True, False, False, False]
    assert adjusted["b"].p == 0.04


def test_what_is_not_of_the_family_is_left_as_it_is() -> None:
    adjusted = holm({"a": of_p(0.04), "b": of_p(0.03)}, among=["a"])
    assert (adjusted["a"].adjusted, adjusted["b"].adjusted) == (0.04, 0.03)


def test_over_a_page_of_equal_models_something_is_clear_at_most_one_time_in_twenty() -> None:
    draw = np.random.default_rng(5)
    pages = 0
    for _ in range(150):
        p = p_values(draw.normal(size=(20, 24)), seed=0, flips=1999)
        pages += any(c.clear for c in holm({str(k): of_p(float(value)) for k, value in enumerate(p)}).values())
    assert pages <= 14  # of 150; without the adjustment about 90


# --------------------------------------------------------------------------------------------- undefined, few, repeated


def test_pairs_with_an_undefined_side_are_left_out() -> None:
    found = compare([1.0, None, 3.0, 4.0, None], [2.0, 5.0, None, 6.0, 1.0], seed=1)
    assert (found.difference, found.n) == (1.5, 2)
    assert (found.base_undefined, found.tuned_undefined) == (2, 1)
    assert found.as_json()["undefined"] == {"base": 2, "tuned": 1}


def test_a_models_mean_does_not_change_with_whom_it_is_compared() -> None:
    base = [1.0, None, 3.0, 5.0]
    found = [compare(base, other, seed=1) for other in ([1.0] * 4, [None, 1.0, None, 2.0], [None] * 4)]
    assert [comparison.base for comparison in found] == [3.0] * 3
    assert [comparison.tuned for comparison in found] == [1.0, 1.5, None]
    assert [comparison.n for comparison in found] == [3, 1, 0]


def test_without_pairs_there_is_no_difference() -> None:
    found = compare([None], [1.0], seed=1)
    assert (found.base, found.tuned, found.difference, found.p, found.n, found.clear) == (
        None,
        1.0,
        None,
        None,
        0,
        False,
    )


def test_one_pair_has_a_difference_and_no_interval() -> None:
    found = compare([1.0], [3.0], seed=1)
    assert (found.difference, found.low, found.high, found.p, found.clear) == (2.0, None, None, None, False)


def test_two_equal_models_do_not_differ() -> None:
    found = compare([0.25] * 20, [0.25] * 20, seed=1)
    assert (found.low, found.high, found.p, found.clear) == (0.0, 0.0, 1.0, False)


def test_the_same_seed_gives_the_same_p_value() -> None:
    base, tuned = np.random.default_rng(0).normal(0, 1, (2, 30)).tolist()
    assert compare(base, tuned, seed=5) == compare(base, tuned, seed=5)


# ------------------------------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize(
    ("low", "high", "decimals"),
    [
        (-0.3, -0.1, 2), (0.1, 0.3, 2), (-0.02, 0.01, 3), (0.0001, 0.0021, 4), (0.00004, 0.0021, 5), (-3.0, 4.0, 1),
        (0.1, 0.1, 2), (0.0, 0.0, 3), (-120.0, 300.0, 1), (-0.000032, 0.000005, 4), (-0.00003, 0.0, 4),
    ],
)  # fmt: skip
def test_decimals_are_those_of_the_interval(low: float, high: float, decimals: int) -> None:
    found = Comparison(0.5, 0.5, (low + high) / 2, low, high, 20, 0.01, 0.01)
    assert found.decimals == decimals
    if low > 0 or high < 0:
        assert all(float(f"{end:.{decimals}f}") != 0 for end in (low, high)), "an end that reads 0 contradicts it"


def test_the_relative_change_is_of_the_base() -> None:
    assert Comparison(-0.5, -0.4, 0.1, 0.0, 0.2, 9).relative == pytest.approx(0.2)
    assert Comparison(0.0, 0.4, 0.4, 0.0, 0.8, 9).relative is None
