"""The trajectories that a rank learns from, as tensors, checked to be sampled by the policy that learns."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.trajectory import REMEDY, GroupRecord
from layerloop.components.storage.groups import Group
from layerloop.components.storage.rollouts import read_groups
from layerloop.components.storage.store import Store


@dataclass(frozen=True)
class Trajectory:
    """Latents of one candidate: `window[w+1, S, C]` or `final[S, C]`, as the algorithm needs; float32, CPU."""

    seed: int
    latents: Tensor


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one group that this rank learns from."""

    record: GroupRecord
    condition: Tensor  # condition[h*w, C], float32
    trajectories: dict[int, Trajectory] = field(default_factory=dict)  # by candidate


@dataclass(frozen=True)
class Expected:
    """The origin that trajectories must have, and their shape."""

    iteration: int
    base_fingerprint: str
    adapter_sha256: str | None
    algorithm: str
    timesteps: int  # window steps that are learned from, where the algorithm learns from them
    token_pixels: int  # side of a packed token
    channels: int  # C, of a packed token


def read_trajectories(
    store: Store, manifests: Mapping[int, Manifest], wanted: Mapping[int, Set[int]], expected: Expected
) -> dict[int, Trajectories]:
    """Trajectories of `wanted` (group -> candidates), by group; shards of other groups are not fetched.

    Args:
        manifests: those of the iteration's groups, by group.

    Raises:
        LayerloopError: a group that was sampled from another model or adapter, or that contradicts itself; latents that
            are not finite or not of the record's and the model's shape; a wanted candidate that is not there.
    """
    if unknown := sorted(wanted.keys() - manifests.keys()):
        raise _missing_error(expected, unknown[0])
    return {
        group.record.group: _trajectories_of(group, wanted[group.record.group], expected)
        for group in read_groups(store, manifests, wanted, latents=True)
    }


def _trajectories_of(group: Group, wanted: Set[int], expected: Expected) -> Trajectories:
    _check_record(group.record, expected, where=group.where)
    if unknown := sorted(candidate for candidate in wanted if candidate not in range(len(group.candidates))):
        raise _missing_error(expected, group.record.group, unknown[0])
    return Trajectories(
        group.record,
        torch.from_numpy(group.condition(expected.channels)),
        {
            candidate.record.candidate: Trajectory(
                candidate.record.seed,
                torch.from_numpy(
                    candidate.window(expected.channels)
                    if ALGORITHMS[expected.algorithm].samples_from == "window"
                    else candidate.final(expected.channels)
                ),
            )
            for candidate in group.candidates
            if candidate.record.candidate in wanted
        },
    )


def _missing_error(expected: Expected, group: int, candidate: int | None = None) -> LayerloopError:
    what = f"group {group}" if candidate is None else f"candidate {candidate} of group {group}"
    return LayerloopError(
        f"rollouts of iteration {expected.iteration} lack {what}, which was scored: score the iteration again"
    )


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
