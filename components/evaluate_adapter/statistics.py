"""Paired comparison of two models on the same samples: intervals and tests that hold for few and skewed differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Signs = npt.NDArray[np.int8]
Name = TypeVar("Name")

LEVEL = 0.95  # of confidence intervals
FEWEST = 8  # pairs; below it a test of signs cannot reach the level with a margin
FLIPS = 9_999  # draws of the sign-flip test; a p-value at the level is off by 0.002
EXACT = 14  # pairs up to which all sign patterns are tried
MOST_DECIMALS = 8
MOST_DECIMALS_OF_NOTHING = 4  # of a difference that may be none
ROWS = 1_000  # sign patterns that are in memory as numbers at once

METHOD = (
    "Base and adapter decompose the same images from the same initial noise, so every difference is taken within an "
    "image and averaged. An image for which a measure is undefined is in no mean of that model and in no difference; "
    "how many there are is shown, since they may be those on which a model is worst. The 95 % interval of the mean "
    "difference is the hull of two: Student’s, and Hall’s (1992), which "
    "corrects Student’s for skewness (continued in a straight line where its cubic flattens). The p-value is the "
    "largest of three: of both, and of the sign-flip test, exact "
    f"up to {EXACT} images and from {FLIPS:,} seeded draws above, which holds for measures of few values. By "
    "simulation, where nothing differs, at most 6 in 100 are called clear with 8 images or more, of normal and of "
    "exponentially skewed differences; of skewness 6 it takes about 30 images to get there, and no test sees what none "
    "of the images shows: a large loss on one image in a hundred. On a page many measures "
    "are looked at: p-values are adjusted for all that are read together (Holm), and a difference is called clear, and "
    "coloured, only when its adjusted p-value is at most 5 %, its interval excludes 0 and it comes from "
    f"{FEWEST} images or more. Read together are the measures of the tables, LayerD’s scores by number of edits, and "
    "the slots by layer count; of each at most one page in twenty has anything coloured where nothing differs."
)


@dataclass(frozen=True)
class Comparison:
    """A measure of two models over `n` pairs. `low` and `high` bound the mean difference tuned - base, and `p` is of no
    difference; None for n < 2. `adjusted` is `p` corrected for the measures looked at together (`holm`)."""

    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    adjusted: float | None = None
    base_undefined: int = 0  # images for which the measure has no value, which are in no mean
    tuned_undefined: int = 0

    @property
    def clear(self) -> bool:
        """Whether the difference is not chance: adjusted p-value, interval and `FEWEST` pairs agree."""
        return (
            self.n >= FEWEST
            and self.adjusted is not None
            and self.adjusted <= 1 - LEVEL + 1e-12
            and self.low is not None
            and self.high is not None
            and (self.low > 0 or self.high < 0)
        )

    @property
    def relative(self) -> float | None:
        """The difference as a share of the base's value; None where that is 0."""
        return self.difference / abs(self.base) if self.difference is not None and self.base else None

    @property
    def decimals(self) -> int:
        """Decimals that the interval supports: two digits of its width, no more than four where it holds 0, and no end
        that reads 0 where it does not."""
        if self.low is None or self.high is None:
            return 3
        ends = (abs(self.low), abs(self.high))
        width = self.high - self.low or max(ends)
        needed = 1 - math.floor(math.log10(width)) if width > 0 else 3
        if self.low <= 0 <= self.high:
            return min(max(needed, 1), MOST_DECIMALS_OF_NOTHING)
        return min(max(needed, 1, -math.floor(math.log10(min(ends)))), MOST_DECIMALS)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `as_json` wrote."""
        names = ("base", "tuned", "difference", "low", "high", "n", "p", "adjusted")
        undefined = values.get("undefined", {})
        counts = {f"{model}_undefined": undefined.get(model, 0) for model in ("base", "tuned")}
        return cls(**{name: values[name] for name in names}, **counts)

    def as_json(self) -> dict[str, Any]:
        """The fields by name, with what follows from them."""
        names = ("base", "tuned", "difference", "low", "high", "n", "p", "adjusted", "relative", "decimals", "clear")
        undefined = {"base": self.base_undefined, "tuned": self.tuned_undefined}
        return {**{name: getattr(self, name) for name in names}, "undefined": undefined}


def compare(
    base: Sequence[float | None], tuned: Sequence[float | None], *, seed: int, flips: int = FLIPS, level: float = LEVEL
) -> Comparison:
    """Mean of paired differences with its interval and p-value (METHOD); `adjusted` is `p`, of one measure alone.

    `base` and `tuned` of the result are means of each by itself, so that a model's number does not change with whom it
    is compared; where a value is undefined, their difference is not the mean of the paired differences.

    Args:
        base: The measure of each image, or None where it is undefined. A pair counts only when both are defined.
        tuned: The same of the other model, in the same order.
        flips: Draws of the sign-flip test, where there are too many patterns to try all.
        seed: Of the draws.
        level: Of the interval.
    """
    pairs = np.array([(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None], np.float64)
    n = len(pairs)
    before, after = _mean(base), _mean(tuned)
    undefined = (sum(value is None for value in base), sum(value is None for value in tuned))
    if n == 0:
        return Comparison(before, after, None, None, None, 0, None, None, *undefined)
    differences = pairs[:, 1] - pairs[:, 0]
    mean = float(differences.mean())
    if n == 1:
        return Comparison(before, after, mean, None, None, 1, None, None, *undefined)
    (low,), (high,) = intervals(differences[None], level)
    (p,) = p_values(differences[None], flips=flips, seed=seed)
    return Comparison(before, after, mean, float(low), float(high), n, float(p), float(p), *undefined)


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are defined."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def intervals(differences: Floats, level: float) -> tuple[Floats, Floats]:
    """(low, high), each `(K,)`, of the means of K rows of differences `(K, n)`, n of 2 or more: the hull of Student's
    interval and of Hall's.

    Hall's statistic of the studentised mean u is u + k (1 + 2 u^2) / 6 + k^2 u^3 / 27 = k / 6 + ((1 + k u / 3)^3 - 1) /
    k with k the sample's skewness over sqrt(n): monotone in u, so that it has an inverse (Hall, On the removal of
    skewness by transformation, J. R. Statist. Soc. B 54, 1992). It is made for k u near 0 and flat at k u = -3, where
    the largest of differences would pass for chance; so below k u = -1.25 it goes on in a straight line. Quantiles are
    Student's of n - 1 degrees of freedom.
    """
    from scipy.stats import t as student

    mean, error, k = _moments(differences)
    h = student.ppf((1 + level) / 2, differences.shape[1] - 1)
    ends = np.stack([np.full_like(k, -h), np.full_like(k, h)])
    steep = np.where(np.abs(k) < 1e-9, 1.0, k)
    hall = np.where(np.abs(k) < 1e-9, ends, _uncubed(steep * (ends - steep / 6)) / steep)
    lowest, highest = np.minimum(hall[0], -h), np.maximum(hall[1], h)
    return mean - highest * error, mean - lowest * error


def p_values(differences: Floats, *, seed: int, flips: int = FLIPS) -> Floats:
    """Two-sided p-values `(K,)` of a mean of 0, of K rows of differences `(K, n)`: the largest of Student's, Hall's and
    that of sign flips. 1 where all differences are 0."""
    from scipy.stats import t as student

    mean, error, k = _moments(differences)
    u = np.divide(mean, error, out=np.full_like(mean, np.inf), where=error > 0)
    steep = np.where((np.abs(k) < 1e-9) | (error <= 0), 1.0, k)
    finite = np.where(error > 0, u, 0.0)
    hall = np.where(np.abs(k) < 1e-9, u, _cubed(steep * finite) / steep + steep / 6)
    hall = np.where(error > 0, hall, np.inf)
    free = differences.shape[1] - 1
    tails = np.maximum(student.sf(np.abs(u), free), student.sf(np.abs(hall), free))
    return np.where(np.any(differences != 0, axis=1), np.maximum(2 * tails, _flipped(differences, flips, seed)), 1.0)


_LINE = -1.25  # below it, Hall's cubic of k u is continued by its tangent


def _cubed(z: Floats) -> Floats:
    """(1 + z / 3)^3 - 1, below _LINE its tangent."""
    slope, at = (1 + _LINE / 3) ** 2, (1 + _LINE / 3) ** 3 - 1
    return np.where(z >= _LINE, (1 + z / 3) ** 3 - 1, at + slope * (z - _LINE))


def _uncubed(y: Floats) -> Floats:
    """The inverse of `_cubed`."""
    slope, at = (1 + _LINE / 3) ** 2, (1 + _LINE / 3) ** 3 - 1
    return np.where(y >= at, 3 * (np.cbrt(1 + y) - 1), _LINE + (y - at) / slope)


def _moments(differences: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, its standard error, and skewness over sqrt(n), each `(K,)`; of equal differences the last two are 0."""
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    centred = differences - mean[:, None]
    spread = np.sqrt((centred**2).sum(axis=1) / (n - 1))
    spread = np.where(spread > 1e-12 * np.abs(differences).max(axis=1), spread, 0.0)  # else rounding
    third = (centred**3).sum(axis=1) * n / max(1, (n - 1) * (n - 2))
    skew = np.divide(third, spread**3, out=np.zeros_like(third), where=(spread > 0) & (n > 2))
    return mean, spread / math.sqrt(n), skew / math.sqrt(n)


def _flipped(differences: Floats, flips: int, seed: int) -> Floats:
    """Share of sign patterns under which the sum is at least as far from 0 as it is."""
    n = differences.shape[1]
    found = np.abs(differences.sum(axis=1)) * (1 - 1e-9)
    exact = n <= EXACT
    signs = _all_signs(n) if exact else _drawn_signs(n, flips, seed)
    reached = np.zeros(len(differences), np.int64)
    for start in range(0, len(signs), ROWS):
        sums = differences @ signs[start : start + ROWS].T.astype(np.float64)
        reached += (np.abs(sums) >= found[:, None]).sum(axis=1)
    return np.asarray(reached / len(signs) if exact else (reached + 1) / (len(signs) + 1))


@functools.lru_cache(maxsize=EXACT)
def _all_signs(n: int) -> Signs:
    """All patterns of n signs up to their mirror images, `(2^(n-1), n)`."""
    return np.asarray(1 - 2 * ((np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1), np.int8)


@functools.lru_cache(maxsize=4)
def _drawn_signs(n: int, flips: int, seed: int) -> Signs:
    """`(flips, n)`. They are kept since every measure of a page is tested by them: a byte each."""
    draw, signs = np.random.default_rng(seed), np.empty((flips, n), np.int8)
    for start in range(0, flips, ROWS):
        part = signs[start : start + ROWS]
        part[:] = 1 - 2 * draw.integers(0, 2, part.shape)
    return signs


def holm(comparisons: Mapping[Name, Comparison], among: Iterable[Name] | None = None) -> dict[Name, Comparison]:
    """The comparisons with `adjusted` set for all that are looked at together (Holm, Scand. J. Statist. 6, 1979): the
    probability of one wrong "clear" or more among them is at most 5 %.

    Args:
        among: Names of the family; the others are left as they are. By default all.
    """
    family = [name for name in (comparisons if among is None else among) if comparisons[name].p is not None]
    ranked = sorted(family, key=lambda name: comparisons[name].p or 0.0)
    adjusted = dict(comparisons)
    worst = 0.0
    for rank, name in enumerate(ranked):
        worst = max(worst, min(1.0, (comparisons[name].p or 0.0) * (len(ranked) - rank)))
        adjusted[name] = replace(comparisons[name], adjusted=worst)
    return adjusted
