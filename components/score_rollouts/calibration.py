"""From scores to rewards: aggregation over criteria, the judge's variance, and its bias by position.

Pure functions of numbers; scores are in [0, 1].
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

LOG_GAIN = 4.0  # of the log-tamed aggregation: the first tenth of a criterion is worth 3.6 times the last


def aggregate(scores: Mapping[str, float], weights: Mapping[str, float], how: Literal["mean", "log"]) -> float:
    """One reward in [0, 1] from the criteria, with weights that sum to 1.

    "mean": sum w q. "log": sum w log(1 + 4 q) / log 5, so that each further step of one criterion is worth less, and
    the way to more reward is the criterion that is behind.
    """
    if how == "log":
        return sum(weights[name] * math.log1p(LOG_GAIN * scores[name]) / math.log1p(LOG_GAIN) for name in weights)
    return sum(weights[name] * scores[name] for name in weights)


def std_over_repeats(repeats: Sequence[float]) -> float | None:
    """Standard deviation of one candidate's reward over repeats (sample, n - 1); None with fewer than two."""
    return float(np.std(repeats, ddof=1)) if len(repeats) > 1 else None


def reliability(rewards: Sequence[float], stds: Sequence[float | None], repeats: int) -> float:
    """Share of a group's reward variance that is not the judge's own variance, [0, 1]: the weight of its update.

    The variance of the mean rewards is signal + noise / repeats; noise is the mean of the squared spreads. A group
    whose candidates do not differ gets 0.
    """
    known = [s for s in stds if s is not None]
    if not known or len(rewards) < 2:
        return 1.0
    total = float(np.var(rewards, ddof=1))
    noise = float(np.mean(np.square(known))) / max(1, repeats)
    return 0.0 if total <= 0 else min(max((total - noise) / total, 0.0), 1.0)


def position_share(observations: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """Share of the reward variance within grids that the row's position explains.

    Args:
        observations: (position, reward less the mean of its grid), over all grids of an iteration.

    Returns:
        (share, share corrected for chance). The first is the correlation ratio eta^2 = SS_between / SS_total, which is
        about (positions - 1) / (observations - 1) without any bias; the second is epsilon^2, 0 on average without bias.
    """
    groups: dict[int, list[float]] = defaultdict(list)
    for position, value in observations:
        groups[position].append(value)
    values = np.concatenate([np.array(v) for v in groups.values()]) if groups else np.zeros(0)
    total = float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0
    free = len(values) - len(groups)
    if total <= 0 or free <= 0:
        return 0.0, 0.0
    between = sum(len(v) * (float(np.mean(v)) - float(values.mean())) ** 2 for v in groups.values())
    chance = (len(groups) - 1) * (total - between) / free
    return between / total, max(0.0, (between - chance) / total)
