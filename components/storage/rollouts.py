"""The rollouts of an iteration: one shard per group, committed by a manifest per group.

    iterations/000007/rollouts/g000003-<hash>.tar    the samples of group 3; schema/trajectory.py describes them
    iterations/000007/rollouts/g000003.json          the manifest that commits it

Neither names nor bytes depend on which worker sampled the group or on how many workers there were, so every attempt at
an iteration may have another number of them. Earlier versions wrote `g000003.tar`, and before that
`w00of02-000000.tar` and one manifest per worker, `w00of02.json`, with its groups in the order of its shards: these are
read, but no longer written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.trajectory import REMEDY, GroupRecord, candidate_key, group_key
from layerloop.components.storage.groups import Group, SampledGroup, read_group, samples_of
from layerloop.components.storage.manifests import commit, load
from layerloop.components.storage.shards import existing_shards, read_shard, write_shard
from layerloop.components.storage.store import Store

_GROUP = re.compile(r"g(\d{6,})\.json")
_WORKER = re.compile(r"w(\d+)of(\d+)\.json")  # of earlier versions
_READERS = 16  # manifests that are fetched at once


def shard_name(folder: str, group: int) -> str:
    """Name of a group's shard in the rollouts folder of its iteration, without its hash."""
    return f"{folder}/g{group:06d}.tar"


def manifest_name(folder: str, group: int) -> str:
    """Name of the manifest that commits a group."""
    return f"{folder}/g{group:06d}.json"


# ------------------------------------------------------------------------------------------------------------- writing


def write_group(
    store: Store, folder: str, group: SampledGroup, *, model_calls: int, recipe_sha256: str | None = None
) -> Manifest:
    """Write a group's shard and commit it; a group that another attempt has committed meanwhile is left unchanged.

    Returns:
        The manifest that counts: this one, or the other attempt's.

    Raises:
        LayerloopError: as `commit_group`.
    """
    record = group.record
    done = load(store, manifest_name(folder, record.group))
    if done is not None:
        return _checked(done, store, record.iteration, record.group)
    shard = write_shard(store, shard_name(folder, record.group), samples_of(group))
    return commit_group(store, folder, record, shard, model_calls=model_calls, recipe_sha256=recipe_sha256)


def commit_group(
    store: Store,
    folder: str,
    record: GroupRecord,
    shard: Shard,
    *,
    model_calls: int,
    recipe_sha256: str | None = None,
) -> Manifest:
    """Commit a group whose shard is in the store; `recipe_sha256` is `Campaign.recipe_sha256`.

    Returns:
        The manifest that counts: this one, or that of an attempt which was faster, whose bytes may be others (sampled
        on another kind of processor, for instance).

    Raises:
        LayerloopError: a faster attempt sampled with another policy.
    """
    where = manifest_name(folder, record.group)
    manifest = Manifest(
        kind="rollouts",
        iteration=record.iteration,
        shards=(shard,),
        counts={
            "groups": 1,
            "candidates": record.group_size,
            "layers": record.group_size * record.layers,
            "model_calls": model_calls,
        },
        metadata={
            "groups": [record.group],
            "base_fingerprint": record.base_fingerprint,
            "adapter_sha256": record.adapter_sha256,
            "sigmas": {f"{record.width}x{record.height}": list(record.sigmas)},
            **({"recipe_sha256": recipe_sha256} if recipe_sha256 else {}),
        },
    )
    stored = _checked(commit(store, where, manifest), store, record.iteration, record.group)
    for name, theirs, ours in (
        ("base_fingerprint", stored.metadata.get("base_fingerprint"), record.base_fingerprint),
        ("adapter_sha256", stored.metadata.get("adapter_sha256"), record.adapter_sha256),
    ):
        if theirs != ours:
            raise LayerloopError(
                f"{store.uri}/{where} was committed by another attempt with {name} {theirs!s:.12}, this one has "
                f"{ours!s:.12}: use one model and one adapter, {REMEDY}"
            )
    return stored


def resume_group(
    store: Store,
    folder: str,
    iteration: int,
    group: int,
    *,
    group_size: int,
    base_fingerprint: str,
    adapter_sha256: str | None,
) -> tuple[Shard, GroupRecord] | None:
    """The shard of a group that an interrupted attempt wrote completely, with the same policy, and did not commit."""
    keys = [group_key(iteration, group), *(candidate_key(iteration, group, c) for c in range(group_size))]
    for shard in existing_shards(store, shard_name(folder, group), keys):
        _, members = next(read_shard(store, shard, required=("json",), wanted=lambda suffix: suffix == "json"))
        record = GroupRecord.from_json(members["json"], where=f"{store.uri}/{shard.name}")
        if (record.base_fingerprint, record.adapter_sha256) == (base_fingerprint, adapter_sha256):
            return shard, record
    return None


# ---------------------------------------------------------------------------------------------------- what is committed


def sampled_groups(store: Store, folder: str, iteration: int) -> list[int]:
    """Numbers of the groups that are committed, ascending. One listing; no manifest of a group is read."""
    own, of_workers = _listed(store, folder)
    found = set(own).union(*(_by_group(load(store, name), store, name, iteration) for name in of_workers))
    return sorted(found)


def committed_groups(
    store: Store, folder: str, iteration: int, groups: Collection[int] | None = None
) -> dict[int, Manifest]:
    """Manifests of one group each, by group, of the groups that are committed; of `groups` only if they are given.

    Raises:
        LayerloopError: a manifest is not one of this iteration's rollouts.
    """
    own, of_workers = _listed(store, folder)
    wanted = [group for group in own if groups is None or group in groups]
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        loaded = pool.map(lambda group: load(store, own[group]), wanted)
        found = {
            group: _checked(manifest, store, iteration, group)
            for group, manifest in zip(wanted, loaded, strict=True)
            if manifest is not None  # deleted since it was listed
        }
    for name in of_workers:  # groups do not depend on the workers, so of several manifests any one will do
        for group, manifest in _by_group(load(store, name), store, name, iteration).items():
            if groups is None or group in groups:
                found.setdefault(group, manifest)
    return dict(sorted(found.items()))


def rollouts_sha256(manifests: Mapping[int, Manifest]) -> str:
    """Hash of an iteration's groups and their bytes: what scores are of."""
    text = "".join(f"{group} {manifests[group].shards[0].sha256}\n" for group in sorted(manifests))
    return hashlib.sha256(text.encode()).hexdigest()


def _listed(store: Store, folder: str) -> tuple[dict[int, str], list[str]]:
    """Names of the manifests of groups, by group, and of workers, those of the fewest workers first."""
    own: dict[int, str] = {}
    of_workers: list[tuple[int, int, str]] = []
    for name in store.list(f"{folder}/"):
        base = name.rpartition("/")[2]
        if match := _GROUP.fullmatch(base):
            own[int(match[1])] = name
        elif match := _WORKER.fullmatch(base):
            of_workers.append((int(match[2]), int(match[1]), name))
    return own, [name for *_, name in sorted(of_workers)]


def _checked(manifest: Manifest, store: Store, iteration: int, group: int) -> Manifest:
    found = (manifest.kind, manifest.iteration, manifest.metadata.get("groups"), len(manifest.shards))
    if found != ("rollouts", iteration, [group], 1):
        raise LayerloopError(
            f"the manifest of group {group} of iteration {iteration} in {store.uri} is of {found[0]} {found[1]}, "
            f"groups {found[2]}, with {found[3]} shards: delete it to have the group sampled again"
        )
    return manifest


def _by_group(manifest: Manifest | None, store: Store, name: str, iteration: int) -> dict[int, Manifest]:
    """The manifest of a worker (earlier versions) as one manifest per group."""
    if manifest is None:
        return {}
    groups = manifest.metadata.get("groups")
    fault = ""
    if (manifest.kind, manifest.iteration) != ("rollouts", iteration):
        fault = f"is of {manifest.kind} {manifest.iteration}, not of rollouts {iteration}"
    elif not isinstance(groups, list):
        fault = "has no metadata.groups"
    elif len(groups) != len(manifest.shards):
        fault = f"has {len(manifest.shards)} shards for {len(groups)} groups"
    if fault or not isinstance(groups, list):
        raise LayerloopError(f"{store.uri}/{name} {fault}: delete it to have its groups sampled again")
    return {
        int(group): Manifest(
            kind="rollouts",
            iteration=iteration,
            shards=(shard,),
            counts={"groups": 1, "candidates": shard.samples - 1},
            metadata=manifest.metadata | {"groups": [group]},
        )
        for group, shard in zip(groups, manifest.shards, strict=True)
        if isinstance(group, int)
    }


# ------------------------------------------------------------------------------------------------------------- reading


def read_groups(
    store: Store,
    manifests: Mapping[int, Manifest],
    groups: Iterable[int] | None = None,
    *,
    layers: bool = False,
    latents: bool = False,
) -> Iterator[Group]:
    """Groups of an iteration, complete, by ascending number; shards of others are not fetched.

    Args:
        manifests: by group, as `committed_groups` gives them.
        groups: which; all by default.
        layers: read the image and the candidates' layers.
        latents: read the condition and the candidates' latents.

    Raises:
        LayerloopError: a shard that is not what was committed, or does not hold one group with all its candidates and
            what is asked for of them, each under its own key.
    """
    for group in sorted(manifests if groups is None else groups):
        manifest = manifests[group]
        if manifest.iteration is None:
            raise ValueError(f"manifest of group {group} has no iteration")
        yield read_group(store, manifest.shards[0], manifest.iteration, group, layers=layers, latents=latents)
