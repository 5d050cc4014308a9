"""From judgements to rewards: merging grids on one scale, aggregation over criteria, doubt, and bias by position.

Pure functions of numbers. Scores are in [0, 1]; `n` candidates are numbered 0..n-1 within their group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LOG_GAIN = 4.0  # of the log-tamed aggregation: the first tenth of a criterion is worth 3.6 times the last


@dataclass(frozen=True)
class Sighting:
    """One candidate's scores in one grid: which pass over the group, which grid of it, and which row."""

    repeat: int
    grid: int
    position: int
    candidate: int
    scores: Mapping[str, float]


def merge(sightings: Sequence[Sighting], names: Sequence[str]) -> dict[int, dict[str, float]]:
    """Scores of every candidate that was seen, on one scale.

    A judge's level differs from grid to grid. Per criterion the scores are modelled as y = t_candidate + o_grid,
    solved by least squares with the smallest offsets o that explain them; candidates shared by grids tie the grids
    together. When every grid shows the same candidates this is their plain mean.

    Returns:
        candidate -> criterion -> score, clipped to [0, 1].
    """
    candidates = sorted({s.candidate for s in sightings})
    grids = sorted({(s.repeat, s.grid) for s in sightings})
    if not candidates:
        return {}
    column = {c: i for i, c in enumerate(candidates)}
    row = {g: i for i, g in enumerate(grids)}
    n, m = len(candidates), len(grids)
    # Ridge on the offsets: unregularised, a constant could be moved between t and o. It is small, so that shared
    # candidates decide, and it leaves no offset to a single grid.
    design = np.zeros((len(sightings) + m, n + m))
    for index, s in enumerate(sightings):
        design[index, column[s.candidate]] = 1
        design[index, n + row[s.repeat, s.grid]] = 1
    design[len(sightings) :, n:] = np.eye(m) * 0.03
    values = np.zeros((len(design), len(names)))
    values[: len(sightings)] = [[s.scores[name] for name in names] for s in sightings]
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return {
        c: {name: float(min(max(solution[column[c], k], 0.0), 1.0)) for k, name in enumerate(names)} for c in candidates
    }


def win_rates(pairs: Iterable[Sequence[Sighting]], names: Sequence[str]) -> dict[int, dict[str, float]]:
    """candidate -> criterion -> mean win share (1 won, 0.5 tie, 0 lost) over the pairs that it was in."""
    shares: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for pair in pairs:
        for sighting in pair:
            shares[sighting.candidate].append(sighting.scores)
    return {c: mean_scores(found, names) for c, found in sorted(shares.items())}


def mean_scores(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: sum(s[name] for s in scores) / len(scores) for name in names}


def aggregate(scores: Mapping[str, float], weights: Mapping[str, float], how: Literal["mean", "log"]) -> float:
    """One reward in [0, 1] from the criteria, with weights that sum to 1.

    "mean": sum w q. "log": sum w log(1 + 4 q) / log 5, so that each further step of one criterion is worth less, and
    the way to more reward is the criterion that is behind.
    """
    if how == "log":
        return sum(weights[k] * math.log1p(LOG_GAIN * scores[k]) / math.log1p(LOG_GAIN) for k in weights)
    return sum(weights[k] * scores[k] for k in weights)


def spread(repeats: Sequence[float]) -> float | None:
    """Standard deviation of one candidate's reward over repeats (sample, n - 1); None with fewer than two."""
    return float(np.std(repeats, ddof=1)) if len(repeats) > 1 else None


def reliability(rewards: Sequence[float], spreads: Sequence[float | None], repeats: int) -> float:
    """Share of a group's reward variance that is not the judge's own doubt, [0, 1]: the weight of its update.

    The variance of the mean rewards is signal + noise / repeats; noise is the mean of the squared spreads. A group
    whose candidates cannot be told apart gets 0.
    """
    known = [s for s in spreads if s is not None]
    if not known or len(rewards) < 2:
        return 1.0
    total = float(np.var(rewards, ddof=1))
    noise = float(np.mean(np.square(known))) / max(1, repeats)
    return 0.0 if total <= 0 else min(max((total - noise) / total, 0.0), 1.0)


def position_share(observations: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """How much of the reward variance within grids is explained by the row's position.

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
