"""Group-relative advantages: how much better a candidate was judged than the others of its own image.

Pure arithmetic in float64. A group is one image with its G candidates; the key is the group's number and never the
prompt, which is the same for every image of a campaign.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.learning import UpdateRecipe

Floats = NDArray[np.float64]


def group_mean_and_std(rewards: Floats, weights: Floats) -> tuple[float, float]:
    """Weighted mean and population standard deviation (ddof 0) of one group.

    Args:
        rewards: `rewards[G]`, finite.
        weights: `weights[G]`, non-negative with a positive sum; all ones gives the plain mean and deviation.
    """
    share = weights / weights.sum()
    mean = float((share * rewards).sum())
    return mean, float(np.sqrt((share * (rewards - mean) ** 2).sum()))


def normalise(rewards: Floats, weights: Floats, *, epsilon: float, clip: float) -> Floats:
    """Advantages `A[G] = clip((r - mean) / (std + epsilon), -clip, clip)`; their mean is 0 where none is clipped.

    `epsilon` keeps a group of nearly equal rewards from being blown up to unit spread: A has deviation
    std / (std + epsilon). Source: Flow-GRPO (arXiv 2505.05470), per-image statistics.
    """
    mean, std = group_mean_and_std(rewards, weights)
    return np.clip((rewards - mean) / (std + epsilon), -clip, clip)


@dataclass(frozen=True)
class GroupAdvantage:
    """The learning signal of one group: parallel tuples over its valid candidates, in order of candidate."""

    group: int
    layers: int
    candidates: tuple[int, ...]
    advantages: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Advantages:
    """What the scores of one iteration teach."""

    groups: tuple[GroupAdvantage, ...]  # in order of group
    flat: tuple[int, ...] = ()  # groups whose rewards spread less than `min_reward_std`
    small: tuple[int, ...] = ()  # groups with fewer than two valid candidates
    masked: int = 0  # candidates without a reward
    reward_mean: float = 0.0  # over valid candidates
    reward_std: float = 0.0  # mean over groups of the within-group deviation
    advantage_std: float = 0.0  # over the candidates that are trained on
    clipped: int = 0  # advantages at the clip

    @property
    def filtered_fraction(self) -> float:
        """Share of groups that teach nothing."""
        left_out = len(self.flat) + len(self.small)
        return left_out / max(1, left_out + len(self.groups))


def advantages_of(rows: Iterable[ScoreRow], recipe: UpdateRecipe) -> Advantages:
    """Advantages from score rows; masked candidates are left out, never counted as zero.

    Groups with fewer than two valid candidates, or whose rewards spread less than `recipe.min_reward_std` (a tolerance:
    the deviation of identical floats is 1e-16, not 0), are filtered. A row's `weight` (how far the judge agrees with
    itself) weighs the candidate in the group's mean and deviation and in the loss.

    Raises:
        LayerloopError: a reward or weight that is not finite, or a candidate that is judged twice.
    """
    by_group: dict[int, dict[int, ScoreRow]] = {}
    for row in rows:
        members = by_group.setdefault(row.group, {})
        if row.candidate in members:
            raise LayerloopError(
                f"scores judge candidate {row.candidate} of group {row.group} twice: score the iteration again"
            )
        members[row.candidate] = row

    groups: list[GroupAdvantage] = []
    flat: list[int] = []
    small: list[int] = []
    masked, clipped = 0, 0
    every_reward: list[float] = []
    spreads: list[float] = []
    for group, members in sorted(by_group.items()):
        valid = [members[c] for c in sorted(members) if members[c].reward is not None]
        masked += len(members) - len(valid)
        rewards, weights = _rewards(valid), _weights(valid)
        every_reward.extend(rewards)
        if len(valid) < 2 or np.count_nonzero(weights) < 2:
            small.append(group)
            continue
        _, std = group_mean_and_std(rewards, weights)
        spreads.append(std)
        if std <= recipe.min_reward_std:
            flat.append(group)
            continue
        advantages = normalise(rewards, weights, epsilon=recipe.advantage_epsilon, clip=recipe.advantage_clip)
        clipped += int(np.count_nonzero(np.abs(advantages) >= recipe.advantage_clip))
        groups.append(
            GroupAdvantage(
                group=group,
                layers=valid[0].layers,
                candidates=tuple(row.candidate for row in valid),
                advantages=tuple(float(a) for a in advantages),
                weights=tuple(float(w) for w in weights),
            )
        )
    trained = np.array([a for g in groups for a in g.advantages], dtype=np.float64)
    return Advantages(
        groups=tuple(groups),
        flat=tuple(flat),
        small=tuple(small),
        masked=masked,
        reward_mean=float(np.mean(every_reward)) if every_reward else 0.0,
        reward_std=float(np.mean(spreads)) if spreads else 0.0,
        advantage_std=float(trained.std()) if trained.size else 0.0,
        clipped=clipped,
    )


def _rewards(rows: Sequence[ScoreRow]) -> Floats:
    rewards = np.array([row.reward for row in rows], dtype=np.float64)
    for row, reward in zip(rows, rewards, strict=True):
        if not np.isfinite(reward):
            raise LayerloopError(
                f"reward of candidate {row.candidate} of group {row.group} is {reward}: a failed judgement must be a "
                "mask; score the iteration again"
            )
    return rewards


def _weights(rows: Sequence[ScoreRow]) -> Floats:
    weights = np.array([row.weight for row in rows], dtype=np.float64)
    for row, weight in zip(rows, weights, strict=True):
        if not (np.isfinite(weight) and weight >= 0):
            raise LayerloopError(
                f"weight of candidate {row.candidate} of group {row.group} is {weight}: give a finite one of at least 0"
            )
    return weights
