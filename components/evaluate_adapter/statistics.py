"""Paired comparison of two models on the same samples, with a bootstrap confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # of confidence intervals
FEWEST = 8  # pairs; the bootstrap of fewer is too narrow to call anything clear

METHOD = (
    "Base and adapter decompose the same images from the same initial noise, so every difference is taken within an "
    "image and averaged. The interval is the 95 % percentile bootstrap of that mean: images are drawn with "
    "replacement {resamples:,} times from a fixed seed. A difference is called clear, and coloured, only when its "
    "interval excludes 0 and it comes from {fewest} images or more: intervals from fewer are too narrow. "
    "Where nothing differs, chance still calls about one measure in ten clear with 10 images, one in fifteen with 24."
)


@dataclass(frozen=True)
class Comparison:
    """A measure of two models over `n` pairs. `low` and `high` bound the mean difference tuned - base; None for n <
    2."""

    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0 and comes from at least `FEWEST` pairs."""
        return self.n >= FEWEST and self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def compare(
    base: Sequence[float | None], tuned: Sequence[float | None], *, resamples: int, seed: int, level: float = LEVEL
) -> Comparison:
    """Mean of paired differences and its percentile bootstrap interval.

    Args:
        base: The measure of each image, or None where it is undefined. A pair counts only when both are defined.
        tuned: The same of the other model, in the same order.
        resamples: Bootstrap draws.
        seed: Of the draws.
        level: Of the interval.
    """
    pairs = np.array([(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None], np.float64)
    n = len(pairs)
    if n == 0:
        return Comparison(None, None, None, None, None, 0)
    differences = pairs[:, 1] - pairs[:, 0]
    low = high = None
    if n > 1:
        draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
        tail = (1 - level) / 2
        low, high = (float(x) for x in np.quantile(differences[draws].mean(axis=1), (tail, 1 - tail)))
    means = pairs.mean(axis=0)
    return Comparison(float(means[0]), float(means[1]), float(differences.mean()), low, high, n)
