"""Retention: what of past iterations is removed, by `recipe.retention` after each update or by `layerloop campaign gc`.

Only objects go, never a manifest or a score, so what is left can still be checked and a re-run of an old iteration
finds it committed. The record of a removal (removals.py) is written before the first object is deleted: where a process
is killed in between, the next removal completes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.schema.recipe import RetentionRecipe
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.inventory import unnamed_objects
from layerloop.components.storage.lease import EVALUATION, PUBLICATION, SCOPES, USUAL, Timing, hold, holder
from layerloop.components.storage.removals import record_removal, removed_files

Log = Callable[[str], None]
NEEDED = 2  # policies that the loop may still need: the head's learns next, the one before it may sample (rollout.lag)
_THREADS = 16
_ITERATION = re.compile(r".*-(\d{6})")  # in the names of evaluations


@dataclass(frozen=True)
class Expired:
    """Objects of one folder that are no longer kept and still there, by name, with their bytes."""

    folder: str
    objects: dict[str, int]
    recorded: tuple[File, ...] = ()  # what the record of the removal has to name, gone already or not

    @property
    def bytes(self) -> int:
        return sum(self.objects.values())


def apply_retention(campaign: Campaign, *, log: Log) -> None:
    """Remove what `recipe.retention` no longer keeps. To be called under the training's lease, after an update.

    A store that refuses is no reason to stop a training: it is logged, and the next update tries again.
    """
    keep = campaign.recipe.retention
    if keep == RetentionRecipe():
        return
    busy = any(
        held is not None and held.alive is not None
        for held in (holder(campaign.store, scope) for scope in (EVALUATION, PUBLICATION))
    )
    if busy:  # it may be about to read an older policy
        keep = keep.model_copy(update={"policies": None})
    try:
        removed = [_remove(campaign, expired) for expired in _oldest_first(_expired(campaign, keep, all_of_them=False))]
    except LayerloopError as error:
        log(f"retention: {error}; the next update tries again, or layerloop campaign gc {campaign.uri}")
        return
    if count := sum(len(expired.objects) for expired in removed):
        log(f"retention: removed {count} objects of past iterations, {sum(e.bytes for e in removed) / 1e6:.1f} MB")


def garbage(campaign: Campaign, keep: RetentionRecipe) -> list[Expired]:
    """All that `keep` does not keep, of every past iteration, and what no manifest names where work has ended. Nothing
    is changed, and no lease is needed.

    Raises:
        LayerloopError: a manifest is damaged: what it names cannot be told from what nobody names.
    """
    found = _oldest_first(_expired(campaign, keep, all_of_them=True))
    known = {name for expired in found for name in expired.objects}
    unnamed: dict[str, dict[str, int]] = {}
    for name, size in unnamed_objects(campaign).items():
        if name not in known and _has_ended(campaign, name):
            unnamed.setdefault(name.rpartition("/")[0], {})[name] = size
    return found + [Expired(folder, objects) for folder, objects in sorted(unnamed.items())]


def collect_garbage(campaign: Campaign, keep: RetentionRecipe, *, log: Log, timing: Timing = USUAL) -> list[Expired]:
    """Remove the garbage and unfinished writes, under all leases; returns what was removed of objects.

    Raises:
        LayerloopError: a run holds the campaign; as `garbage`.
    """
    with ExitStack() as held:
        for scope in SCOPES:
            held.enter_context(hold(campaign.store, scope, log=log, timing=timing))
        removed = [_remove(campaign, expired) for expired in garbage(campaign, keep)]
        campaign.store.remove_leftovers()  # a bucket charges for the parts of an upload that was killed
        return removed


def _oldest_first(expired: Iterable[Expired]) -> list[Expired]:
    """Oldest first: an iteration that is done says that those before it are."""
    return sorted(expired, key=lambda one: one.folder)


def _expired(campaign: Campaign, keep: RetentionRecipe, *, all_of_them: bool) -> Iterator[Expired]:
    """Folders of past iterations with objects that are no longer kept, newest first of each kind; unless
    `all_of_them` are wanted, back to the first that is done: those before it were removed earlier."""
    head = campaign.head()
    wanted: list[tuple[range, Callable[[Campaign, int], Expired]]] = []
    if keep.trajectories is not None:
        wanted.append((range(head - keep.trajectories, 0, -1), _rollouts))
    if keep.policies is not None:
        wanted.append((range(head - NEEDED, 0, -1), _policy))
    if keep.replies is not None:
        wanted.append((range(head - keep.replies, 0, -1), _replies))
    kept = _kept_policies(campaign, keep.policies) if keep.policies is not None else set()
    for iterations, look in wanted:
        for number in iterations:
            if (look is _policy and number in kept) or not _is_closed(campaign, number):
                continue
            expired = look(campaign, number)
            if expired.objects or expired.recorded:
                yield expired
            elif not all_of_them:
                break


def _is_closed(campaign: Campaign, iteration: int) -> bool:
    """Whether an iteration has its scores and its policy: then it has ended."""
    folders = campaign.scores_dir(iteration), campaign.policy_dir(iteration)
    return all(campaign.store.exists(f"{folder}/{MANIFEST}") for folder in folders)


def _kept_policies(campaign: Campaign, every: int) -> set[int]:
    """Past iterations whose policies stay: every so many-th, and those that have an evaluation, begun or done, or a
    publication."""
    evaluated = [match for name in campaign.store.folders("evaluations") if (match := _ITERATION.fullmatch(name))]
    published = [campaign.find(campaign.published_dir(name)) for name in campaign.published()]
    return {
        *range(0, campaign.head() + 1, every),
        *(int(match[1]) for match in evaluated),
        *(manifest.iteration for manifest in published if manifest is not None and manifest.iteration is not None),
    }


def _rollouts(campaign: Campaign, iteration: int) -> Expired:
    groups = campaign.committed_groups(iteration).values()
    return _of_manifests(campaign, campaign.rollouts_dir(iteration), groups)


def _policy(campaign: Campaign, iteration: int) -> Expired:
    return _of_manifests(campaign, campaign.policy_dir(iteration), [campaign.policy(iteration)])


def _replies(campaign: Campaign, iteration: int) -> Expired:
    folder = f"{campaign.scores_dir(iteration)}/replies"  # named by no manifest, so nobody has to be told
    return Expired(folder, campaign.store.sizes(f"{folder}/"))


def _of_manifests(campaign: Campaign, folder: str, manifests: Iterable[Manifest]) -> Expired:
    """What the manifests of a folder name in that folder: no other manifest names that."""
    named = {
        file.name: file
        for manifest in manifests
        for file in (*manifest.shards, *manifest.files)
        if file.name.startswith(f"{folder}/")
    }
    there = campaign.store.sizes(f"{folder}/")
    recorded = removed_files(campaign.store, folder).keys() >= named.keys()
    objects = {name: there[name] for name in named if name in there}
    return Expired(folder, objects, () if recorded and not objects else tuple(named.values()))


def _has_ended(campaign: Campaign, name: str) -> bool:
    """Whether nobody will take up an object that no manifest names: the output that it was written for is committed."""
    parts = name.split("/")
    if parts[0] == "iterations":
        return parts[1].isdigit() and campaign.find(campaign.policy_dir(int(parts[1]))) is not None
    folder = {"publications": "published"}.get(parts[0], parts[0])
    owner = folder if folder == campaign.sources_dir else f"{folder}/{parts[1]}" if len(parts) > 2 else ""
    return bool(owner) and campaign.store.exists(f"{owner}/{MANIFEST}")


def _remove(campaign: Campaign, expired: Expired) -> Expired:
    store = campaign.store
    if expired.recorded:
        record_removal(store, expired.folder, expired.recorded)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(store.delete, expired.objects))
    return expired
