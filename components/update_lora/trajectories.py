"""Reading the trajectories of an iteration, refusing what the policy that is about to learn did not sample."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.trajectory import REMEDY, CandidateRecord, GroupRecord, candidate_key, group_key
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.stores import Store


@dataclass(frozen=True)
class Trajectory:
    """What is kept of one candidate: `window[w+1, S, C]` or `final[S, C]`, as the algorithm needs; float32, CPU."""

    seed: int
    latents: Tensor


@dataclass(frozen=True)
class Group:
    """One image with the trajectories that this rank learns from."""

    record: GroupRecord
    condition: Tensor  # condition[h*w, C], float32
    trajectories: dict[int, Trajectory] = field(default_factory=dict)  # by candidate


@dataclass(frozen=True)
class Expected:
    """What a trajectory must have been sampled with."""

    iteration: int
    base_fingerprint: str
    adapter_sha256: str | None
    algorithm: str
    timesteps: int  # window steps that are learned from, where the algorithm learns from them
    token_pixels: int  # side of a packed token
    channels: int  # C, of a packed token


def read_groups(
    store: Store, manifests: list[Manifest], wanted: Mapping[int, Set[int]], expected: Expected
) -> dict[int, Group]:
    """Groups of `wanted` (group -> candidates) from the workers' shards; shards without one are not fetched.

    Raises:
        LayerloopError: a record of another model, adapter, iteration or schema version, or one that contradicts itself;
            latents that are not finite or not of the record's and the model's shape; a wanted candidate that is not
            there.
    """
    groups: dict[int, Group] = {}
    for manifest in manifests:
        for shard in _shards(manifest, wanted):
            where = f"{store.uri}/{shard.name}"
            for key, members in read_shard(store, shard, required=("json",)):
                if "condition.safetensors" in members:
                    record = GroupRecord.from_json(members["json"], where=f"{where}:{key}.json")
                    _check(record, expected, where=f"{where}:{key}")
                    _check_key(key, group_key(record.iteration, record.group), where=f"{where}:{key}")
                    if record.group in wanted:
                        condition = _condition(members, record, expected, where=f"{where}:{key}")
                        groups[record.group] = Group(record, condition)
                    continue
                candidate = CandidateRecord.from_json(members["json"], where=f"{where}:{key}.json")
                own = candidate_key(candidate.iteration, candidate.group, candidate.candidate)
                _check_key(key, own, where=f"{where}:{key}")
                if candidate.candidate in wanted.get(candidate.group, ()):
                    group = groups.get(candidate.group)
                    if group is None:
                        raise LayerloopError(f"{where}:{key} comes before its group's record: {REMEDY}")
                    group.trajectories[candidate.candidate] = _trajectory(
                        members, group.record, candidate, expected, where=f"{where}:{key}"
                    )
    for group_number, candidate_number in _missing(groups, wanted):
        raise LayerloopError(
            f"rollouts of iteration {expected.iteration} lack candidate {candidate_number} of group {group_number}, "
            "which was scored: score the iteration again"
        )
    return groups


def _shards(manifest: Manifest, wanted: Container[int]) -> list[Shard]:
    """The shards that may hold a wanted group. A worker writes one for each of its groups, in the order of its list."""
    groups = manifest.metadata.get("groups")
    if not isinstance(groups, list) or len(groups) != len(manifest.shards):
        return list(manifest.shards)
    return [shard for group, shard in zip(groups, manifest.shards, strict=True) if group in wanted]


def _missing(groups: Mapping[int, Group], wanted: Mapping[int, Set[int]]) -> Iterator[tuple[int, int]]:
    for group, candidates in sorted(wanted.items()):
        there = groups[group].trajectories.keys() if group in groups else set()
        yield from ((group, candidate) for candidate in sorted(candidates - there))


def _check(record: GroupRecord, expected: Expected, *, where: str) -> None:
    if record.iteration != expected.iteration:
        raise LayerloopError(f"{where} is of iteration {record.iteration}, not {expected.iteration}: {REMEDY}")
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


def _check_key(key: str, own: str, *, where: str) -> None:
    if key != own:
        raise LayerloopError(f"{where} holds the record of {own}: {REMEDY}")


def _condition(members: Mapping[str, bytes], record: GroupRecord, expected: Expected, *, where: str) -> Tensor:
    shape = (record.latent_height * record.latent_width, expected.channels)
    return _tensor(members, "condition.safetensors", "condition", shape, where=where)


def _trajectory(
    members: Mapping[str, bytes], record: GroupRecord, candidate: CandidateRecord, expected: Expected, *, where: str
) -> Trajectory:
    tokens = (record.layers + 1) * record.latent_height * record.latent_width
    name = ALGORITHMS[expected.algorithm].samples_from
    steps = (record.window_size + 1,) if name == "window" else ()
    shape = (*steps, tokens, expected.channels)
    return Trajectory(candidate.seed, _tensor(members, "trajectory.safetensors", name, shape, where=where))


def _tensor(members: Mapping[str, bytes], member: str, name: str, shape: tuple[int, ...], *, where: str) -> Tensor:
    """One finite float32 tensor of a safetensors member."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if member not in members:
        raise LayerloopError(f"{where} lacks {member}: {REMEDY}")
    try:
        tensors = load(members[member])
    except (SafetensorError, KeyError) as error:  # a KeyError for a dtype that torch has not
        raise LayerloopError(f"{where}.{member} is not safetensors ({error}): {REMEDY}") from None
    if name not in tensors:
        raise LayerloopError(f"{where}.{member} has no tensor {name!r}: {REMEDY}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        found, wanted = (" x ".join(map(str, sizes)) or "one number" for sizes in (tensor.shape, shape))
        raise LayerloopError(
            f"{where}.{member} {name} is {found}, its record and the model's channels say {wanted}: {REMEDY}"
        )
    if tensor.dtype != torch.float32:
        raise LayerloopError(f"{where}.{member} {name} is {tensor.dtype}, latents are stored in float32: {REMEDY}")
    if not bool(torch.isfinite(tensor).all()):
        raise LayerloopError(
            f"{where}.{member} {name} has NaN or infinite latents: the policy that sampled it has diverged, or the "
            "model's dtype overflows; go back to an earlier iteration"
        )
    return tensor
