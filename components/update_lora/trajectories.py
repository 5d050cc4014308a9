"""The trajectories that a rank learns from, as tensors, checked to be sampled by the policy that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from layerloop.components.runtime.balance import share
from layerloop.components.runtime.distributed import Exchange
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.trajectory import REMEDY, GroupRecord
from layerloop.components.storage.groups import Candidate, Group
from layerloop.components.storage.rollouts import read_groups
from layerloop.components.storage.store import Store

Wanted = Mapping[int, Set[int]]  # group -> candidates


@dataclass(frozen=True)
class Trajectory:
    """Latents of one candidate: `window[w+1, S, C]` or `final[S, C]`, as the algorithm needs; float32, CPU. Where the
    recipe keeps them also `velocities[w, S, C]` of the window's steps, from forward passes of `rows` rows."""

    seed: int
    latents: Tensor
    velocities: Tensor | None = None
    rows: int = 0


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one group that this rank learns from."""

    record: GroupRecord
    condition: Tensor  # condition[h*w, C], float32
    trajectories: dict[int, Trajectory] = field(default_factory=dict)  # by candidate

    def only(self, candidates: Set[int]) -> Trajectories:
        """The same group with some of its candidates."""
        return Trajectories(self.record, self.condition, {c: self.trajectories[c] for c in sorted(candidates)})

    def arrays(self) -> list[np.ndarray]:
        """The group as it is sent to another rank: latents by ascending candidate, condition, seeds, record, and where
        there are velocities these with their rows."""
        record = np.frombuffer(self.record.to_json(), np.uint8)
        seeds = np.array([one.seed for one in self.trajectories.values()], np.uint64)
        latents = np.stack([one.latents.numpy() for one in self.trajectories.values()])
        velocities = [one.velocities.numpy() for one in self.trajectories.values() if one.velocities is not None]
        rows = np.array([one.rows for one in self.trajectories.values()], np.int32)
        return [latents, self.condition.numpy(), seeds, record, *([np.stack(velocities), rows] if velocities else [])]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], candidates: Sequence[int]) -> Trajectories:
        """What `arrays` was made of."""
        latents, condition, seeds, record, *kept = arrays
        velocities, rows = kept or ([None] * len(candidates), [0] * len(candidates))
        return cls(
            GroupRecord.from_json(record.tobytes(), where="a group of another rank"),
            torch.from_numpy(condition),
            {
                candidate: Trajectory(
                    int(seed), torch.from_numpy(one), None if v is None else torch.from_numpy(v), int(n)
                )
                for candidate, seed, one, v, n in zip(candidates, seeds, latents, velocities, rows, strict=True)
            },
        )


@dataclass(frozen=True)
class Expected:
    """The origin that trajectories must have, and their shape."""

    iteration: int
    base_fingerprint: str
    adapter_sha256: str | None
    algorithm: str
    timesteps: int  # window steps that are learned from, where the algorithm learns from them
    velocities: bool  # whether they were kept
    token_pixels: int  # side of a packed token
    channels: int  # C, of a packed token


def reader_of(manifests: Mapping[int, Manifest], wanted: Sequence[Wanted]) -> dict[int, int]:
    """The rank that fetches each group's shard, so that none fetches much more than its share of the bytes.

    Args:
        manifests: those of the iteration's groups, by group.
        wanted: candidates that a rank learns from, by group, for every rank.

    Raises:
        LayerloopError: a group was scored that was not sampled.
    """
    groups = sorted({group for mine in wanted for group in mine})
    if (unknown := next((group for group in groups if group not in manifests), None)) is not None:
        raise _missing_error(unknown)
    sizes = [sum(shard.bytes for shard in manifests[group].shards) for group in groups]
    return {groups[index]: rank for rank, mine in enumerate(share(sizes, len(wanted))) for index in mine}


def read_shards(
    store: Store, manifests: Mapping[int, Manifest], readers: Mapping[int, int], rank: int
) -> dict[int, Group]:
    """The groups that a rank reads, with their latents; shards of others are not fetched."""
    mine = [group for group, reader in readers.items() if reader == rank]
    return {group.record.group: group for group in read_groups(store, manifests, mine, latents=True)}


def share_trajectories(
    groups: Mapping[int, Group], readers: Mapping[int, int], wanted: Sequence[Wanted], expected: Expected, rank: int
) -> dict[int, Trajectories]:
    """Trajectories that this rank learns from, by group; of `groups`, which it has read, it sends what others need.

    Raises:
        LayerloopError: a group that was sampled from another model or adapter, or that contradicts itself; latents that
            are not finite or not of the record's and the model's shape; a wanted candidate that is not there. Groups
            that another rank cannot give are left out: that rank raises.
    """
    moved = sorted((g, to) for to, mine in enumerate(wanted) for g in mine if readers[g] != to)
    tags = {pair: tag for tag, pair in enumerate(moved)}
    by_source: dict[int, list[int]] = {}
    for (group, to), tag in tags.items():
        if to == rank:
            by_source.setdefault(readers[group], []).append(tag)
    exchange = Exchange(by_source)
    to_send = [(group, to) for group, to in moved if readers[group] == rank]
    found: dict[int, Trajectories] = {}
    try:
        for group in sorted(groups):
            everyone = set().union(*(mine.get(group, set()) for mine in wanted))
            complete = _trajectories_of(groups[group], everyone, expected)
            if group in wanted[rank]:
                found[group] = complete.only(wanted[rank][group])
            for pair in [pair for pair in to_send if pair[0] == group]:
                exchange.send(pair[1], tags[pair], complete.only(wanted[pair[1]][group]).arrays())
                to_send.remove(pair)
    finally:
        for pair in to_send:
            exchange.send(pair[1], tags[pair], [])
    for tag, arrays in exchange.receive(wait=True):
        group = moved[tag][0]
        if arrays:
            found[group] = Trajectories.of(arrays, sorted(wanted[rank][group]))
    exchange.finish()
    return found


def _trajectories_of(group: Group, wanted: Set[int], expected: Expected) -> Trajectories:
    _check_record(group.record, expected, where=group.where)
    if unknown := sorted(candidate for candidate in wanted if candidate not in range(len(group.candidates))):
        raise _missing_error(group.record.group, unknown[0])
    return Trajectories(
        group.record,
        torch.from_numpy(group.condition(expected.channels)),
        {
            candidate.record.candidate: _trajectory_of(candidate, expected)
            for candidate in group.candidates
            if candidate.record.candidate in wanted
        },
    )


def _trajectory_of(candidate: Candidate, expected: Expected) -> Trajectory:
    seed, channels = candidate.record.seed, expected.channels
    if ALGORITHMS[expected.algorithm].samples_from == "final":
        return Trajectory(seed, torch.from_numpy(candidate.final(channels)))
    window = torch.from_numpy(candidate.window(channels))
    if not expected.velocities:
        return Trajectory(seed, window)
    return Trajectory(seed, window, torch.from_numpy(candidate.velocities(channels)), candidate.rows())


def _missing_error(group: int, candidate: int | None = None) -> LayerloopError:
    what = f"group {group}" if candidate is None else f"candidate {candidate} of group {group}"
    return LayerloopError(f"rollouts of the iteration lack {what}, which was scored: score the iteration again")


def _check_record(record: GroupRecord, expected: Expected, *, where: str) -> None:
    """Raises LayerloopError where a group was not sampled as expected; `where` names it."""
    if record.base_fingerprint != expected.base_fingerprint:
        raise LayerloopError(
            f"{where} was sampled from a base model with fingerprint {record.base_fingerprint[:12]}, this one has "
            f"{expected.base_fingerprint[:12]}: use the model that the campaign began with"
        )
    if record.adapter_sha256 != expected.adapter_sha256:
        theirs, ours = (sha[:12] if sha else "none" for sha in (record.adapter_sha256, expected.adapter_sha256))
        raise LayerloopError(
            f"{where} was sampled with adapter {theirs}, the policy of iteration {expected.iteration - 1} has {ours}: "
            f"{REMEDY}"
        )
    windowed = ALGORITHMS[expected.algorithm].samples_from == "window"
    if windowed and (record.dynamics == "ode" or record.window_size != expected.timesteps):
        raise LayerloopError(
            f"{where} has an SDE window of {record.window_size} steps ({record.dynamics}), recipe.update.algorithm "
            f"{expected.algorithm} learns from {expected.timesteps}: {REMEDY}"
        )
    pixels = (record.latent_height * expected.token_pixels, record.latent_width * expected.token_pixels)
    if (record.height, record.width) != pixels:
        raise LayerloopError(
            f"{where} has height {record.height} and width {record.width}, but its {record.latent_height} x "
            f"{record.latent_width} tokens of {expected.token_pixels} pixels make {pixels[0]} and {pixels[1]}: {REMEDY}"
        )
