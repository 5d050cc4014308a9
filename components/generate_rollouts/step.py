"""The step `generate_rollouts`: for each of this worker's groups one image, one layer count and G sampled candidates,
of which the latents in the stochastic window and the decoded layers are kept.

Under torchrun the ranks share the worker's candidates by estimated cost; groups are committed one by one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue

from layerloop.components.generate_rollouts.observer import Observer
from layerloop.components.generate_rollouts.plan import GroupPlan, plan_iteration, share_groups
from layerloop.components.generate_rollouts.sources import read_images, train_images
from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.distributed import (
    broadcast_json,
    failing_together,
    gather_to_all,
    process_group,
    rank,
    shares_base,
    world_size,
)
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.steps import STEPS
from layerloop.components.schema.trajectory import REMEDY, GroupRecord
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import verify
from layerloop.components.storage.rollouts import commit_group, resume_group, write_group
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    import numpy as np
    import torch

    from layerloop.components.generate_rollouts.candidates import PreparedGroup
    from layerloop.components.generate_rollouts.sharing import Part, Shares
    from layerloop.components.storage.groups import SampledGroup

_COUNTS = ("groups", "candidates", "layers", "model_calls")  # in the manifest of every group


def run(
    loaded: LoadedPolicy | None = None,
    *,
    campaign: str,
    iteration: int | None = None,
    worker: int = 0,
    workers: int = 1,
    runtime: str = "",
) -> StepResult:
    """Sample one iteration's rollouts with the policy of the iteration before it.

    Every group is committed on its own, so an interrupted iteration is finished by any number of workers.

    Args:
        loaded: A policy of this campaign that is in memory already, of whatever iteration: its base is used.
        campaign: Root URI of the campaign.
        iteration: Which iteration to sample; by default the one after the last committed policy.
        worker: This worker's number, from 0; it takes a share of the groups by estimated cost.
        workers: How many workers share the iteration.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Raises:
        LayerloopError: no such worker; the sources or the policy before this iteration are not committed; the model
            cannot be loaded or does not fit the images, or differs from the one that other groups of the iteration were
            sampled with; NaN in latents. Groups that were finished before stay committed.
    """
    started = time.monotonic()
    if not 0 <= worker < workers:
        raise LayerloopError(f"worker is {worker} of {workers}: choose workers of at least 1 and a worker below it")
    opened = Campaign.open(campaign, runtime)
    share = Share.of(opened, opened.open_iteration(iteration), worker, workers)
    if (done := _finished(opened, share, _committed(opened, share))) is not None:
        return _result(done)
    with hold(opened.store, log=log):
        committed = _committed(opened, share)
        if (done := _finished(opened, share, committed)) is not None:  # by the run that held it until now
            return _result(done)
        opened.check_unfinished(share.iteration)
        with process_group() as device:
            sampled = sample_iteration(opened, share.iteration, committed, share.groups, device=device, loaded=loaded)
    manifest = worker_manifest(share, sampled.manifests)
    return _result(manifest, seconds=time.monotonic() - started, sampled=sampled.written, bad_layers=sampled.bad_layers)


@dataclass(frozen=True)
class Share:
    """A worker's part of an iteration."""

    iteration: int
    worker: int
    workers: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, campaign: Campaign, iteration: int, worker: int, workers: int) -> Share:
        """The share of a worker, which follows from the recipe: whatever is committed, and by whom, changes none."""
        planned = plan_iteration(campaign.recipe, iteration, train_images(campaign.sources()))
        groups = share_groups(planned, campaign.recipe.rollout, workers)[worker]
        return cls(iteration, worker, workers, tuple(groups))


def _committed(campaign: Campaign, share: Share) -> dict[int, Manifest]:
    """Manifests of the share's groups that are committed, whose shards are there."""
    committed = campaign.committed_groups(share.iteration, share.groups)
    verify(campaign.store, worker_manifest(share, committed))
    return committed


def _finished(campaign: Campaign, share: Share, committed: Mapping[int, Manifest]) -> Manifest | None:
    """The manifest of the share where all of it is committed; logged."""
    if len(committed) < len(share.groups):
        return None
    where = f"{campaign.uri}/{campaign.rollouts_dir(share.iteration)}"
    log(f"{where} of worker {share.worker + 1} of {share.workers} is committed already")
    return worker_manifest(share, committed)


@dataclass(frozen=True)
class Sampled:
    """An iteration's groups by number, and what this rank did for them."""

    loaded: LoadedPolicy  # that sampled
    manifests: dict[int, Manifest]
    written: int
    bad_layers: list[float]  # of each group that this rank wrote, on average


def sample_iteration(
    campaign: Campaign,
    iteration: int,
    committed: Mapping[int, Manifest],
    groups: Sequence[int],
    *,
    device: torch.device,
    loaded: LoadedPolicy | None = None,
    observer: Observer | None = None,
) -> Sampled:
    """Sample and commit the groups that are not `committed`, with all ranks of the process group.

    Args:
        committed: As the first rank found them: between two ranks' looks another pod may have committed one.
        loaded: A policy of this campaign in memory, of whatever iteration: its base is used.
        observer: Is told what this rank samples, and may end the sampling on all ranks.
    """
    committed = _of_first_rank(committed)
    with failing_together():
        sources = campaign.sources()
        planned = plan_iteration(campaign.recipe, iteration, train_images(sources))
        plans = [plan for plan in planned if plan.group in groups]
        sharded = shares_base(campaign.runtime.model)
        sampler = campaign.recipe.rollout.sampler(iteration)
        loaded = policy_at(campaign, sampler, device=device, sharded=sharded, loaded=loaded)
        _check_same_policy(committed, iteration, loaded)
        found = {plan.group: _resumed(campaign, iteration, plan.group, loaded)
                 for plan in plans[rank() :: world_size()] if plan.group not in committed}  # fmt: skip
    manifests = {**committed, **_gather({group: done for group, done in found.items() if done})}
    todo = [plan for plan in plans if plan.group not in manifests]
    if any(others != [plan.group for plan in todo] for others in gather_to_all([plan.group for plan in todo])):
        raise RuntimeError("the ranks have different groups to sample, and would wait for each other without end")
    if not todo:
        return Sampled(loaded, manifests, 0, [])
    images = _images(campaign, sources, todo)
    shares = _shares(campaign, todo, images, loaded)
    # Ranks that share a sharded base wait for each other in its layers, and a fault of one has to end them all.
    with nullcontext() if loaded.policy.sharded else failing_together():
        written, bad_layers = _sample(campaign, iteration, todo, images, shares, loaded, observer or Observer())
    return Sampled(loaded, dict(sorted({**manifests, **_gather(written)}.items())), len(written), bad_layers)


def _of_first_rank(committed: Mapping[int, Manifest]) -> Mapping[int, Manifest]:
    """The first rank's manifests, by group; the ranks would share out different groups else."""
    if world_size() == 1:
        return committed
    said: Any = broadcast_json({group: one.model_dump(mode="json") for group, one in committed.items()})
    return {int(group): Manifest.model_validate(one) for group, one in said.items()}


def _images(campaign: Campaign, sources: Manifest, todo: Sequence[GroupPlan]) -> dict[int, tuple[str, np.ndarray]]:
    """Key and image of the groups, by the image's number; each rank reads a share of them."""
    numbers = sorted({plan.image for plan in todo})
    with failing_together():
        read = list(read_images(campaign.store, sources, numbers[rank() :: world_size()], campaign.recipe))
    return {number: (key, image) for part in gather_to_all(read) for number, key, image in part}


def _shares(
    campaign: Campaign, todo: Sequence[GroupPlan], images: Mapping[int, tuple[str, np.ndarray]], loaded: LoadedPolicy
) -> Shares:
    """Which rank samples what."""
    from layerloop.components.generate_rollouts.sharing import share_batches

    tokens: dict[int, int] = {}
    with failing_together():
        for plan in todo:
            height, width = images[plan.image][1].shape[:2]
            h, w = loaded.policy.tokens(height, width)
            tokens[plan.group] = h * w
    return share_batches(
        todo,
        tokens,
        campaign.recipe.rollout,
        width=loaded.policy.transformer.inner_dim,
        batch_size=campaign.runtime.rollout.batch_size,
        ranks=world_size(),
    )


def _check_same_policy(committed: Mapping[int, Manifest], iteration: int, loaded: LoadedPolicy) -> None:
    """Refuse to finish an iteration with another policy than its committed groups were sampled with."""
    fingerprint, adapter = loaded.base_fingerprint, loaded.adapter_sha256
    for group, manifest in committed.items():
        theirs = manifest.metadata.get("base_fingerprint"), manifest.metadata.get("adapter_sha256")
        if theirs != (fingerprint, adapter):
            raise LayerloopError(
                f"group {group} of iteration {iteration} was sampled from base {theirs[0]!s:.12} with adapter "
                f"{theirs[1]!s:.12}, the policy is now base {fingerprint:.12} with adapter {adapter!s:.12}: use the "
                f"model that the campaign started with, or {REMEDY}"
            )


def _resumed(campaign: Campaign, iteration: int, group: int, loaded: LoadedPolicy) -> Manifest | None:
    """The manifest of a group whose shard an interrupted attempt left without one."""
    folder = campaign.rollouts_dir(iteration)
    found = resume_group(
        campaign.store,
        folder,
        iteration,
        group,
        group_size=campaign.recipe.rollout.group_size,
        base_fingerprint=loaded.base_fingerprint,
        adapter_sha256=loaded.adapter_sha256,
    )
    if found is None:
        return None
    shard, record = found
    return commit_group(
        campaign.store, folder, record, shard, model_calls=_model_calls(record), recipe_sha256=campaign.recipe_sha256
    )


def _sample(
    campaign: Campaign,
    iteration: int,
    todo: Sequence[GroupPlan],
    images: Mapping[int, tuple[str, np.ndarray]],
    shares: Shares,
    loaded: LoadedPolicy,
    observer: Observer,
) -> tuple[dict[int, Manifest], list[float]]:
    """Sample this rank's batches, and commit the groups that it writes as they become complete."""
    from layerloop.components.generate_rollouts.candidates import prepare_group, sample_candidates
    from layerloop.components.generate_rollouts.sharing import Assembly
    from layerloop.components.policy.sharding import dummy_forwards

    recipe, plans = campaign.recipe, {plan.group: plan for plan in todo}

    @functools.cache
    def prepared(group: int) -> PreparedGroup:
        return prepare_group(loaded, recipe, iteration, plans[group], *images[plans[group].image])

    assembly, mine = Assembly(shares, rank()), shares.batches[rank()]
    try:
        with Writer(campaign, iteration, observer) as writer:
            for batch in progress(mine, what="sampling", unit="batches") if rank() == 0 and mine else mine:
                observer.check()
                group, size = prepared(batch.group), campaign.runtime.rollout.batch_size
                part = sample_candidates(loaded.policy, recipe, group, batch.candidates, batch_size=size)
                observer.sampled(iteration, batch.group, batch.candidates, group.image, part.stacks)
                assembly.add(batch, part)
                for number, part in assembly.complete():
                    writer.write(prepared(number), part)
            if loaded.policy.sharded:  # before this rank waits for others, whose layers wait for its calls
                dummy_forwards(loaded.policy, loaded.prompt, max(shares.calls) - shares.calls[rank()])
            for number, part in assembly.complete(wait=True):
                writer.write(prepared(number), part)
        sampled = writer.manifests, writer.bad_layers
    except BaseException:
        if not loaded.policy.sharded:  # else the others wait in its layers, and it has to end
            assembly.close()
        raise
    assembly.close()
    return sampled


class Writer:
    """Encodes and sends groups while the next are sampled; one at most waits for the store."""

    def __init__(self, campaign: Campaign, iteration: int, observer: Observer) -> None:
        self._campaign, self._folder, self._observer = campaign, campaign.rollouts_dir(iteration), observer
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._written: dict[int, Future[Manifest]] = {}
        self.bad_layers: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, group: PreparedGroup, part: Part) -> None:
        """Begin to write and commit a group."""
        from layerloop.components.generate_rollouts.candidates import mean_bad_layers, sampled_group

        if self._written:
            next(reversed(self._written.values())).result()
        self.bad_layers.append(mean_bad_layers(part.stacks, group.image))
        sampled = sampled_group(self._campaign.recipe, group, part)
        calls = _model_calls(group.record)
        self._written[group.record.group] = self._pool.submit(self._commit, sampled, calls)

    def _commit(self, group: SampledGroup, model_calls: int) -> Manifest:
        campaign = self._campaign
        manifest = write_group(
            campaign.store, self._folder, group, model_calls=model_calls, recipe_sha256=campaign.recipe_sha256
        )
        self._observer.committed()
        return manifest

    @property
    def manifests(self) -> dict[int, Manifest]:
        """What was committed, by group; waits for the last."""
        return {number: future.result() for number, future in self._written.items()}


def _model_calls(record: GroupRecord) -> int:
    from layerloop.components.policy.sampling import Plan

    return Plan.of(record).nfe(record.group_size)


def _gather(finished: Mapping[int, Manifest]) -> dict[int, Manifest]:
    """Manifests that all ranks finished, by group."""
    return {group: manifest for part in gather_to_all(dict(finished)) for group, manifest in sorted(part.items())}


def worker_manifest(share: Share, groups: Mapping[int, Manifest]) -> Manifest:
    """One manifest of all groups of a worker: the artifact that Kubeflow shows. The campaign keeps one per group.

    Counts are those that all its groups have: earlier versions counted layers and model calls by worker only.
    """
    manifests = [groups[group] for group in sorted(groups)]
    sigmas: dict[str, JsonValue] = {}
    for manifest in manifests:
        if isinstance(schedules := manifest.metadata.get("sigmas"), dict):
            sigmas |= schedules
    return Manifest(
        kind="rollouts",
        iteration=share.iteration,
        shards=tuple(shard for manifest in manifests for shard in manifest.shards),
        counts={
            name: sum(manifest.counts[name] for manifest in manifests)
            for name in _COUNTS
            if all(name in manifest.counts for manifest in manifests)
        },
        metadata={
            "groups": [*sorted(groups)],
            "worker": share.worker,
            "workers": share.workers,
            "base_fingerprint": manifests[0].metadata.get("base_fingerprint") if manifests else None,
            "adapter_sha256": manifests[0].metadata.get("adapter_sha256") if manifests else None,
            "sigmas": sigmas,
        },
    )


def _result(
    manifest: Manifest, *, seconds: float | None = None, sampled: int = 0, bad_layers: Sequence[float] = ()
) -> StepResult:
    """Outputs for Kubeflow: the manifest's counts, and measurements of the groups that this attempt sampled."""
    metrics = {name: float(count) for name, count in manifest.counts.items()}
    metrics["megabytes"] = sum(shard.bytes for shard in manifest.shards) / 1e6
    if seconds is not None:
        metrics |= {"seconds": seconds, "groups_sampled": float(sampled)}
    if bad_layers:  # on rank 0's groups, under torchrun
        metrics["bad_layers"] = sum(bad_layers) / len(bad_layers)
    return StepResult(manifests={"rollouts": manifest}, metrics=metrics)


main = functools.partial(
    step_main, run, step=STEPS["generate_rollouts"], beyond=("rollouts", "rollouts"),
    launch=ranks.launch_per_gpu, store=open_store,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
