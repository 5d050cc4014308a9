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


def group_mean_and_std(rewards: Floats) -> tuple[float, float]:
    """Mean and population standard deviation (ddof 0) of one group's `rewards[G]`, finite."""
    share = 1 / len(rewards)
    mean = float((share * rewards).sum())
    return mean, float(np.sqrt((share * (rewards - mean) ** 2).sum()))


def normalise(rewards: Floats, *, epsilon: float, clip: float) -> Floats:
    """Advantages `A[G] = clip((r - mean) / (std + epsilon), -clip, clip)`; their mean is 0 where none is clipped.

    `epsilon` keeps a group of nearly equal rewards from being scaled up to unit deviation: A has
    deviation std / (std + epsilon). Source: Flow-GRPO (arXiv 2505.05470), per-image statistics.
    """
    mean, std = group_mean_and_std(rewards)
    return np.clip((rewards - mean) / (std + epsilon), -clip, clip)


@dataclass(frozen=True)
class GroupAdvantage:
    """The learning signal of one group: parallel tuples over its valid candidates, in order of candidate."""

    group: int
    layers: int
    candidates: tuple[int, ...]
    advantages: tuple[float, ...]
    weight: float = 1.0  # of each of its points in the loss, positive


@dataclass(frozen=True)
class Advantages:
    """The learning signal of one iteration, and the groups and candidates left out of it."""

    groups: tuple[GroupAdvantage, ...]  # in order of group
    zero_std_groups: tuple[int, ...] = ()  # rewards deviate no more than `min_reward_std`
    underfilled_groups: tuple[int, ...] = ()  # fewer than two valid candidates
    zero_weight_groups: tuple[int, ...] = ()  # the judge's variance explains all of the rewards'
    masked: int = 0  # candidates without a reward
    reward_mean: float = 0.0  # over valid candidates
    reward_std: float = 0.0  # mean over groups of the within-group deviation
    advantage_std: float = 0.0  # over the candidates that are trained on
    clipped: int = 0  # advantages at the clip

    @property
    def filtered_groups(self) -> int:
        """Groups that give no gradient."""
        return len(self.zero_std_groups) + len(self.underfilled_groups) + len(self.zero_weight_groups)

    @property
    def filtered_fraction(self) -> float:
        """Share of groups that give no gradient."""
        return self.filtered_groups / max(1, self.filtered_groups + len(self.groups))


def advantages_of(rows: Iterable[ScoreRow], recipe: UpdateRecipe) -> Advantages:
    """Advantages from score rows; masked candidates are left out, never counted as zero.

    Filtered are groups with fewer than two valid candidates, of weight 0 (how far the judge agrees with itself), or
    whose rewards deviate no more than `recipe.min_reward_std` (a tolerance: the deviation of identical floats is 1e-16,
    not 0). A group's weight is that of its points in the loss.

    Raises:
        LayerloopError: a reward or weight that is not finite, weights that differ within a group, or a candidate that
            is judged twice.
    """
    groups: list[GroupAdvantage] = []
    zero_std: list[int] = []
    underfilled: list[int] = []
    zero_weight: list[int] = []
    masked, clipped = 0, 0
    every_reward: list[float] = []
    stds: list[float] = []
    for group, members in sorted(_by_group(rows).items()):
        valid = [members[c] for c in sorted(members) if members[c].reward is not None]
        masked += len(members) - len(valid)
        rewards = _rewards(valid)
        every_reward.extend(rewards)
        if len(valid) < 2:
            underfilled.append(group)
            continue
        if (weight := _weight(valid)) == 0:
            zero_weight.append(group)
            continue
        _, std = group_mean_and_std(rewards)
        stds.append(std)
        if std <= recipe.min_reward_std:
            zero_std.append(group)
            continue
        advantages = normalise(rewards, epsilon=recipe.advantage_epsilon, clip=recipe.advantage_clip)
        clipped += int(np.count_nonzero(np.abs(advantages) >= recipe.advantage_clip))
        candidates = tuple(row.candidate for row in valid)
        groups.append(GroupAdvantage(group, valid[0].layers, candidates, tuple(float(a) for a in advantages), weight))
    trained = np.array([a for g in groups for a in g.advantages], dtype=np.float64)
    return Advantages(
        groups=tuple(groups),
        zero_std_groups=tuple(zero_std),
        underfilled_groups=tuple(underfilled),
        zero_weight_groups=tuple(zero_weight),
        masked=masked,
        reward_mean=float(np.mean(every_reward)) if every_reward else 0.0,
        reward_std=float(np.mean(stds)) if stds else 0.0,
        advantage_std=float(trained.std()) if trained.size else 0.0,
        clipped=clipped,
    )


def _by_group(rows: Iterable[ScoreRow]) -> dict[int, dict[int, ScoreRow]]:
    """Group -> candidate -> row."""
    by_group: dict[int, dict[int, ScoreRow]] = {}
    for row in rows:
        members = by_group.setdefault(row.group, {})
        if row.candidate in members:
            raise LayerloopError(
                f"scores judge candidate {row.candidate} of group {row.group} twice: score the iteration again"
            )
        members[row.candidate] = row
    return by_group


def _rewards(rows: Sequence[ScoreRow]) -> Floats:
    """`rewards[G]` of valid candidates, checked to be finite."""
    rewards = np.array([row.reward for row in rows], dtype=np.float64)
    for row, reward in zip(rows, rewards, strict=True):
        if not np.isfinite(reward):
            raise LayerloopError(
                f"reward of candidate {row.candidate} of group {row.group} is {reward}: a failed judgement must be a "
                "mask; score the iteration again"
            )
    return rewards


def _weight(rows: Sequence[ScoreRow]) -> float:
    """The weight of a group, checked to be the same in all its rows."""
    weight = rows[0].weight
    for row in rows:
        if not (np.isfinite(row.weight) and row.weight >= 0):
            raise LayerloopError(
                f"weight of candidate {row.candidate} of group {row.group} is {row.weight}: a group's weight is finite "
                "and at least 0; score the iteration again"
            )
        if row.weight != weight:
            raise LayerloopError(
                f"candidates {rows[0].candidate} and {row.candidate} of group {row.group} have weights {weight} and "
                f"{row.weight}: a group has one; score the iteration again"
            )
    return weight
