"""The step `generate_rollouts`: for each of this worker's groups one image, one layer count and G sampled candidates,
of which the latents in the stochastic window and the decoded layers are kept.

Under torchrun every rank samples its share of the worker's groups, and commits them one by one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from pydantic import JsonValue

from layerloop.components.generate_rollouts.plan import GroupPlan, plan_iteration
from layerloop.components.generate_rollouts.sources import read_images, train_images
from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import (
    all_reduce_sum,
    failing_together,
    process_group,
    rank,
    shares_base,
    world_size,
)
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
        worker: This worker's number, from 0; it takes the groups g with g % workers == worker.
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
    share = Share(opened.open_iteration(iteration), worker, workers)
    if (done := _finished(opened, share, _committed(opened, share))) is not None:
        return _result(done)
    with hold(opened.store, log=log):
        committed = _committed(opened, share)
        if (done := _finished(opened, share, committed)) is not None:  # by the run that held it until now
            return _result(done)
        manifest, sampled, bad_layers = _sample_share(opened, share, committed, loaded)
    return _result(manifest, seconds=time.monotonic() - started, sampled=sampled, bad_layers=bad_layers)


@dataclass(frozen=True)
class Share:
    """A worker's part of an iteration."""

    iteration: int
    worker: int
    workers: int

    def groups(self, campaign: Campaign) -> range:
        return range(campaign.recipe.rollout.groups)[self.worker :: self.workers]


def _committed(campaign: Campaign, share: Share) -> dict[int, Manifest]:
    """Manifests of the share's groups that are committed, whose shards are there."""
    committed = campaign.committed_groups(share.iteration, share.groups(campaign))
    verify(campaign.store, worker_manifest(share, committed))
    return committed


def _finished(campaign: Campaign, share: Share, committed: Mapping[int, Manifest]) -> Manifest | None:
    """The manifest of the share where all of it is committed; logged."""
    if len(committed) < len(share.groups(campaign)):
        return None
    where = f"{campaign.uri}/{campaign.rollouts_dir(share.iteration)}"
    log(f"{where} of worker {share.worker} of {share.workers} is committed already")
    return worker_manifest(share, committed)


def _sample_share(
    opened: Campaign, share: Share, committed: Mapping[int, Manifest], loaded: LoadedPolicy | None
) -> tuple[Manifest, int, list[float]]:
    """Sample what is not committed. Returns the share's manifest, and of this rank the number of groups that it sampled
    and their bad layers. Raises as `run`."""
    from layerloop.components.policy.sharding import dummy_forwards

    current = share.iteration

    with process_group() as device:
        with failing_together():
            sources = opened.sources()
            plans = plan_iteration(opened.recipe, current, train_images(sources))[share.worker :: share.workers]
            sharded = shares_base(opened.runtime.model)
            loaded = policy_at(opened, current - 1, device=device, sharded=sharded, loaded=loaded)
            _check_same_policy(committed, current, loaded)
            finished: dict[int, Manifest] = {}
            todo: list[GroupPlan] = []
            for plan in plans[rank() :: world_size()]:
                done = committed.get(plan.group) or _resumed(opened, current, plan.group, loaded)
                finished |= {plan.group: done} if done else {}
                todo += [] if done else [plan]
        # Ranks that share a sharded base wait for each other in its layers, and a fault of one has to end them all.
        missing_calls = _missing_forward_calls(todo, opened) if loaded.policy.sharded else 0
        with nullcontext() if loaded.policy.sharded else failing_together():
            bad_layers = _sample(opened, current, sources, todo, finished, loaded)
            dummy_forwards(loaded.policy, loaded.prompt, missing_calls)
        return worker_manifest(share, _gather(finished)), len(todo), bad_layers


def _missing_forward_calls(todo: Sequence[GroupPlan], campaign: Campaign) -> int:
    """Number of forward calls by which this rank has less work than the busiest one."""
    import torch

    from layerloop.components.policy.sampling import Plan

    rollout = campaign.recipe.rollout
    calls = torch.zeros(world_size(), dtype=torch.int64)
    for group in todo:
        plan = Plan(
            sigmas=(0.0,) * (rollout.steps + 1),
            window_start=group.window_start,
            window_size=group.window_size,
            dynamics=group.dynamics,
            etas=group.etas,
            outside=rollout.whole if group.dynamics == "ode" else rollout.outside,
            share_prefix=rollout.share_prefix and group.window_size > 0,
        )
        batches = -(-rollout.group_size // campaign.runtime.rollout.batch_size)
        calls[rank()] += plan.nfe(batches)  # a batch takes one sample's calls
    all_reduce_sum([calls])
    return int(calls.max() - calls[rank()])


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
    sources: Manifest,
    todo: Sequence[GroupPlan],
    finished: dict[int, Manifest],
    loaded: LoadedPolicy,
) -> list[float]:
    """Sample and commit the groups of `todo`; `finished` is filled in. Returns the bad layers of each, on average."""
    from layerloop.components.generate_rollouts.candidates import mean_bad_layers, sample_group

    if not todo:
        return []
    numbers = [plan.image for plan in todo]
    images = {
        number: (key, image) for number, key, image in read_images(campaign.store, sources, numbers, campaign.recipe)
    }
    folder = campaign.rollouts_dir(iteration)
    bad_layers: list[float] = []
    with ThreadPoolExecutor(max_workers=1) as writer:  # images are encoded and sent while the next group is sampled
        written: dict[int, Future[Manifest]] = {}
        for plan in progress(todo, what="sampling", unit="groups") if rank() == 0 else todo:
            key, image = images[plan.image]
            batch_size = campaign.runtime.rollout.batch_size
            group = sample_group(loaded, campaign.recipe, iteration, plan, key, image, batch_size=batch_size)
            bad_layers.append(mean_bad_layers(group.stacks, group.image))
            if written:
                next(reversed(written.values())).result()  # so that one group at most waits for the store
            written[plan.group] = writer.submit(
                write_group, campaign.store, folder, group,
                model_calls=_model_calls(group.record), recipe_sha256=campaign.recipe_sha256,
            )  # fmt: skip
        finished |= {number: future.result() for number, future in written.items()}
    return bad_layers


def _model_calls(record: GroupRecord) -> int:
    from layerloop.components.policy.sampling import Plan

    return Plan.of(record).nfe(record.group_size)


def _gather(finished: Mapping[int, Manifest]) -> dict[int, Manifest]:
    """Manifests that all ranks finished, by group."""
    if world_size() == 1:
        return dict(sorted(finished.items()))
    import torch.distributed as dist

    every: list[list[tuple[int, bytes]]] = [[] for _ in range(world_size())]
    dist.all_gather_object(every, [(group, manifest.to_json()) for group, manifest in finished.items()])
    return {
        group: Manifest.from_json(manifest, where=f"group {group}")
        for group, manifest in sorted(entry for part in every for entry in part)
    }


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
