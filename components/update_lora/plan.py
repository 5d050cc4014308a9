"""The plan of an update: candidates by optimizer step, forward pass and rank.

A point is one candidate at one timestep: the unit of a forward pass. A microbatch holds points of one group, so that
its points share image, layer count and size (the model's rotary positions are those of the batch's first sample) and
every timestep of a candidate can be in one pass. All of this follows from the scores alone, before a trajectory is
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from layerloop.components.runtime.balance import forward_cost, share
from layerloop.components.update_lora.advantages import GroupAdvantage


@dataclass(frozen=True)
class Point:
    """One candidate at one timestep: a step of the stochastic window, or a drawn time of the forward process."""

    candidate: int
    timestep: int  # index from 0
    advantage: float
    weight: float  # 0: padding, computed but not counted, so that ranks stay in step


@dataclass(frozen=True)
class Microbatch:
    """Points of one group in one forward pass."""

    group: int
    layers: int
    points: tuple[Point, ...]

    @property
    def cost(self) -> float:
        """Relative cost of its passes."""
        return forward_cost(self.layers) * len(self.points)

    def padding(self) -> Microbatch:
        """A zero-weight copy (padding)."""
        return Microbatch(self.group, self.layers, tuple(Point(p.candidate, p.timestep, 0.0, 0.0) for p in self.points))


@dataclass(frozen=True)
class OptimizerStep:
    """One update of the weights: the microbatches of each rank, and what their sum is divided by."""

    ranks: tuple[tuple[Microbatch, ...], ...]
    total_weight: float  # of all points of all ranks


def plan_steps(
    groups: Sequence[GroupAdvantage],
    *,
    steps: int,
    timesteps: int,
    microbatch: int,
    ranks: int,
    pad: bool,
    by_timestep: bool = False,
) -> tuple[OptimizerStep, ...]:
    """Split groups among optimizer steps (every `steps`-th to the same), then into microbatches, then among ranks.

    Args:
        groups: in order of group; fewer of them than `steps` give fewer steps.
        timesteps: points of a candidate.
        microbatch: most points in one forward pass.
        pad: give every rank equally many microbatches by padding, because the ranks must enter the collectives of a
            sharded model together.
        by_timestep: all points of a microbatch have one timestep, as a forward pass of the sampler has.
    """
    planned = []
    for index in range(min(steps, len(groups))):
        batches = [
            batch
            for group in groups[index::steps]
            for batch in _microbatches(group, timesteps, microbatch, by_timestep)
        ]
        shares = _share_among_ranks(batches, ranks)
        if pad:
            rounds = max(len(share) for share in shares)
            shares = [share + [batches[0].padding()] * (rounds - len(share)) for share in shares]
        planned.append(
            OptimizerStep(
                ranks=tuple(tuple(share) for share in shares),
                total_weight=sum(point.weight for batch in batches for point in batch.points),
            )
        )
    return tuple(planned)


def candidates_of(steps: Sequence[OptimizerStep], rank: int) -> dict[int, set[int]]:
    """Candidates whose trajectories a rank learns from, by group."""
    wanted: dict[int, set[int]] = {}
    for step in steps:
        for microbatch in step.ranks[rank]:
            wanted.setdefault(microbatch.group, set()).update(point.candidate for point in microbatch.points)
    return wanted


def _microbatches(group: GroupAdvantage, timesteps: int, size: int, by_timestep: bool) -> list[Microbatch]:
    """All points of a group in as few passes as `size` allows, of nearly equal sizes."""
    by_time = [
        [
            Point(candidate, timestep, advantage, group.weight)
            for candidate, advantage in zip(group.candidates, group.advantages, strict=True)
        ]
        for timestep in range(timesteps)
    ]
    batches = []
    for points in by_time if by_timestep else [list(chain.from_iterable(zip(*by_time, strict=True)))]:
        passes = -(-len(points) // size)
        bounds = [round(i * len(points) / passes) for i in range(passes + 1)]
        batches += [Microbatch(group.group, group.layers, tuple(points[low:high])) for low, high in pairwise(bounds)]
    return batches


def _share_among_ranks(batches: Sequence[Microbatch], ranks: int) -> list[list[Microbatch]]:
    """The microbatches of each rank, in order; those that begin with one candidate stay together, so that its latents
    are needed on one rank."""
    units: dict[tuple[int, int], list[int]] = {}
    for index, batch in enumerate(batches):
        units.setdefault((batch.group, batch.points[0].candidate), []).append(index)
    members = list(units.values())
    owned = share([sum(batches[index].cost for index in unit) for unit in members], ranks)
    return [[batches[index] for index in sorted(i for unit in mine for i in members[unit])] for mine in owned]
