"""Groups of candidates, read from the shards of an iteration one group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.trajectory import CandidateRecord, GroupRecord
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import decode_png
from layerloop.components.storage.shards import Sample, read_shard


@dataclass
class Candidate:
    """One decomposition, its layers still as PNG bytes, bottom first."""

    record: CandidateRecord
    layers: tuple[bytes, ...]

    def stack(self) -> Pixels:
        """`(L, H, W, 4)` uint8."""
        return np.stack([decode_png(data) for data in self.layers])


@dataclass
class Group:
    """One image with all its candidates; trajectories are left in the shard."""

    record: GroupRecord
    source: bytes
    candidates: list[Candidate] = field(default_factory=list)


def read_groups(campaign: Campaign, iteration: int) -> Iterator[Group]:
    """Every group of an iteration, complete.

    Raises:
        LayerloopError: the iteration lacks groups, or a shard lacks candidates or layers.
    """
    for manifest in campaign.rollouts(iteration):
        group: Group | None = None
        for shard in manifest.shards:
            for key, members in read_shard(campaign.store, shard, required=("json",)):
                where = f"{campaign.uri}/{shard.name}: {key}"
                if "source.png" in members:
                    if group is not None:
                        yield _complete(group, campaign.uri)
                    group = Group(GroupRecord.from_json(members["json"], where=where), members["source.png"])
                elif group is None:
                    raise LayerloopError(f"{where} is a candidate before any group: make the rollouts again")
                else:
                    group.candidates.append(_candidate(group, (key, members), where))
        if group is not None:
            yield _complete(group, campaign.uri)


def _candidate(group: Group, sample: Sample, where: str) -> Candidate:
    members = sample[1]
    record = CandidateRecord.from_json(members["json"], where=where)
    if (record.iteration, record.group) != (group.record.iteration, group.record.group):
        raise LayerloopError(f"{where} is not of group {group.record.group}, which it follows: make the rollouts again")
    names = [f"layer{index}.png" for index in range(group.record.layers)]
    if any(name not in members for name in names):
        raise LayerloopError(f"{where} lacks one of its {len(names)} layers: make the rollouts again")
    return Candidate(record, tuple(members[name] for name in names))


def _complete(group: Group, uri: str) -> Group:
    record = group.record
    if sorted(c.record.candidate for c in group.candidates) != list(range(record.group_size)):
        raise LayerloopError(
            f"group {record.group} of iteration {record.iteration} in {uri} has {len(group.candidates)} candidates for "
            f"{record.group_size}: make the rollouts again"
        )
    group.candidates.sort(key=lambda candidate: candidate.record.candidate)
    return group
