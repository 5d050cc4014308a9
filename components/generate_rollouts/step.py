"""Sample candidate decompositions: for each of this worker's groups one image, one layer count, G candidates, of which
the latents in the stochastic window and the decoded layers are kept.

Under torchrun every rank samples its share of the worker's groups, and rank 0 commits.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from layerloop.components.generate_rollouts.plan import GroupPlan, plan_iteration
from layerloop.components.generate_rollouts.sources import prompt_embedding, read_images, train_images
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import (
    all_reduce_sum,
    broadcast_json,
    failing_together,
    process_group,
    rank,
    shares_base,
    world_size,
)
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.trajectory import GroupRecord, candidate_key, group_key
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.folders import local_folder
from layerloop.components.storage.manifests import commit, load, read_file, verify
from layerloop.components.storage.shards import existing_shard, read_shard, write_shard
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    import torch

    from layerloop.components.generate_rollouts.candidates import SampledGroup
    from layerloop.components.policy.model import LayeredPolicy

Finished = tuple[Shard, GroupRecord]


def run(*, campaign: str, iteration: int | None = None, worker: int = 0, workers: int = 1) -> StepResult:
    """Sample one iteration's rollouts with the policy of the iteration before it.

    Args:
        campaign: Root URI of the campaign.
        iteration: Which iteration to sample; by default the one after the last committed policy.
        worker: This worker's number, from 0; it takes the groups g with g % workers == worker.
        workers: How many workers share the iteration.

    Raises:
        LayerloopError: no such worker; the sources or the policy before this iteration are not committed; the model
            cannot be loaded or does not fit the images; NaN in latents. Nothing is committed then.
    """
    begun = time.monotonic()
    if not 0 <= worker < workers:
        raise LayerloopError(f"worker is {worker} of {workers}: choose workers of at least 1 and a worker below it")
    place = Campaign.open(campaign)
    number = place.head() + 1 if iteration is None else iteration
    if number < 1:
        raise LayerloopError(f"iteration is {number}: iterations count from 1")
    stem = f"{place.rollouts_dir(number)}/w{worker:02d}of{workers:02d}"
    if (done := load(place.store, f"{stem}.json")) is not None:
        verify(place.store, done)
        log(f"iteration {number} of {place.uri} already has the rollouts of worker {worker} of {workers}")
        return _result(done)

    with process_group() as device:
        with failing_together():
            sources, previous = place.sources(), place.policy(number - 1)
            groups = plan_iteration(place.recipe, number, train_images(sources))[worker::workers]
            names = {plan.group: f"{stem}-{n:06d}.tar" for n, plan in enumerate(groups)}
            policy, adapter = load_policy(place, previous, device)
            finished: dict[int, Finished] = {}
            todo: list[GroupPlan] = []
            for plan in groups[rank() :: world_size()]:
                earlier = _earlier(place, number, plan.group, names[plan.group], policy.fingerprint, adapter)
                finished |= {plan.group: earlier} if earlier else {}
                todo += [] if earlier else [plan]
            prompt = prompt_embedding(place.store, sources, policy.transformer.config.joint_attention_dim)
        # Ranks that share a sharded base wait for each other in its layers, and a fault of one has to end them all.
        behind = _behind(todo, place) if policy.sharded else 0
        with nullcontext() if policy.sharded else failing_together():
            bad_layers = _sample(place, number, sources, todo, names, finished, policy, prompt, adapter)
            _keep_in_step(policy, prompt, behind)
        everything = _gather(finished)
        with failing_together():
            manifest = None
            if rank() == 0:
                manifest = _manifest(number, everything, policy.fingerprint, adapter, worker, workers)
                manifest = commit(place.store, f"{stem}.json", manifest)
        committed = Manifest.model_validate(broadcast_json(manifest.model_dump(mode="json") if manifest else None))
    return _result(committed, seconds=time.monotonic() - begun, sampled=len(todo), bad_layers=bad_layers)


def load_policy(place: Campaign, previous: Manifest, device: torch.device) -> tuple[LayeredPolicy, str | None]:
    """The policy that samples: the base with the adapter of `previous`, and that adapter's sha256.

    Before the first update that is the base alone, or with `recipe.lora.start_from` on it.
    """
    from layerloop.components.policy.adapters import weights_sha256
    from layerloop.components.policy.lora import load_adapter, start_from
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.policy.sharding import shard_base

    recipe = place.recipe
    sharded = shares_base(recipe.model)
    base = local_folder(recipe.model.base) if "://" in recipe.model.base else None
    policy = LayeredPolicy.load(recipe.model, device="cpu" if sharded else device, folder=base)
    sha256: str | None = None
    if previous.iteration:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (Path(folder) / name).write_bytes(read_file(place.store, previous.file(name)))
            load_adapter(policy, folder)
            sha256 = weights_sha256(folder)
    elif recipe.lora.start_from is not None:
        source = local_folder(recipe.lora.start_from)
        start_from(policy, recipe.lora, source)
        sha256 = weights_sha256(source)
    if sharded:
        shard_base(policy, device, ranks=world_size())
    return policy, sha256


def _behind(todo: Sequence[GroupPlan], place: Campaign) -> int:
    """How many calls of the model this rank has to do less than the rank that has most."""
    import torch

    from layerloop.components.policy.sampling import Plan

    rollout = place.recipe.rollout
    calls = torch.zeros(world_size(), dtype=torch.int64)
    for group in todo:
        plan = Plan(
            sigmas=(0.0,) * (rollout.steps + 1),
            window_start=group.window_start,
            window_size=group.window_size,
            dynamics=group.dynamics,
            etas=group.etas,
            outside="heun" if group.dynamics == "ode" else rollout.outside,
            share_prefix=rollout.share_prefix and group.window_size > 0,
        )
        calls[rank()] += plan.nfe(-(-rollout.group_size // rollout.batch_size))  # a batch takes one sample's calls
    all_reduce_sum([calls])
    return int(calls.max() - calls[rank()])


def _keep_in_step(policy: LayeredPolicy, prompt_embeds: torch.Tensor, calls: int) -> None:
    """Call the model for nothing, on the smallest input."""
    import torch

    from layerloop.components.policy.model import Condition

    side = policy.pixel_multiple
    prompt = prompt_embeds[None].to(policy.device, policy.dtype)
    condition = Condition(policy.noise(0, 0, side, side).to(policy.device), prompt, side, side)
    for _ in range(calls):
        with torch.no_grad():
            policy.velocity(policy.noise(0, 1, side, side).to(policy.device), 1.0, condition)


def _earlier(
    place: Campaign, iteration: int, group: int, name: str, fingerprint: str, adapter: str | None
) -> Finished | None:
    """A group's shard that an interrupted attempt wrote whole, with the same model."""
    keys = [group_key(iteration, group)]
    keys += [candidate_key(iteration, group, candidate) for candidate in range(place.recipe.rollout.group_size)]
    shard = existing_shard(place.store, name, keys)
    if shard is None:
        return None
    _, members = next(iter(read_shard(place.store, shard, required=("json",))))
    record = GroupRecord.from_json(members["json"], where=f"{place.uri}/{name}")
    same = (record.base_fingerprint, record.adapter_sha256) == (fingerprint, adapter)
    return (shard, record) if same else None


def _sample(
    place: Campaign,
    iteration: int,
    sources: Manifest,
    todo: Sequence[GroupPlan],
    names: Mapping[int, str],
    finished: dict[int, Finished],
    policy: LayeredPolicy,
    prompt_embeds: torch.Tensor,
    adapter: str | None,
) -> list[float]:
    """Sample the groups of `todo` and write a shard for each; `finished` is filled in. Bad layers of each group."""
    from layerloop.components.generate_rollouts.candidates import sample_group

    if not todo:
        return []
    images = {number: (key, image) for number, key, image in read_images(place.store, sources, [p.image for p in todo])}
    bad_layers = []
    with ThreadPoolExecutor(max_workers=1) as writer:  # images are encoded and sent while the next group is sampled
        pending: Future[Finished] | None = None
        for plan in progress(todo, what="sampling", unit="groups") if rank() == 0 else todo:
            key, image = images[plan.image]
            group = sample_group(policy, place.recipe, iteration, plan, key, image, prompt_embeds, adapter)
            bad_layers.append(group.bad_layers)
            if pending is not None:
                _take(finished, pending.result())
            pending = writer.submit(_write, place, names[plan.group], group)
        if pending is not None:
            _take(finished, pending.result())
    return bad_layers


def _write(place: Campaign, name: str, group: SampledGroup) -> Finished:
    return write_shard(place.store, name, group.samples()), group.record


def _take(finished: dict[int, Finished], done: Finished) -> None:
    finished[done[1].group] = done


def _gather(finished: Mapping[int, Finished]) -> dict[int, Finished]:
    """What all ranks finished, by group."""
    if world_size() == 1:
        return dict(sorted(finished.items()))
    import torch.distributed as dist

    mine = [(group, shard.to_json(), record.to_json()) for group, (shard, record) in finished.items()]
    every: list[list[tuple[int, bytes, bytes]]] = [[] for _ in range(world_size())]
    dist.all_gather_object(every, mine)
    return {
        group: (Shard.from_json(shard, where="shard"), GroupRecord.from_json(record, where="group"))
        for group, shard, record in sorted(entry for part in every for entry in part)
    }


def _manifest(
    iteration: int,
    finished: Mapping[int, Finished],
    fingerprint: str,
    adapter: str | None,
    worker: int,
    workers: int,
) -> Manifest:
    from layerloop.components.policy.sampling import Plan

    records = [record for _, record in finished.values()]
    return Manifest(
        kind="rollouts",
        iteration=iteration,
        shards=tuple(shard for shard, _ in finished.values()),
        counts={
            "groups": len(records),
            "candidates": sum(record.group_size for record in records),
            "layers": sum(record.group_size * record.layers for record in records),
            "model_calls": sum(Plan.of(record).nfe(record.group_size) for record in records),
        },
        metadata={
            "groups": list(finished),
            "worker": worker,
            "workers": workers,
            "base_fingerprint": fingerprint,
            "adapter_sha256": adapter,
            "sigmas": {f"{record.width}x{record.height}": list(record.sigmas) for record in records},
        },
    )


def _result(
    manifest: Manifest, *, seconds: float | None = None, sampled: int = 0, bad_layers: Sequence[float] = ()
) -> StepResult:
    """What Kubeflow shows: the manifest's counts, and what this attempt measured of what it sampled itself."""
    metrics = {name: float(count) for name, count in manifest.counts.items()}
    metrics["megabytes"] = sum(shard.bytes for shard in manifest.shards) / 1e6
    if seconds is not None:
        metrics |= {"seconds": seconds, "groups_sampled": float(sampled)}
    if bad_layers:  # on rank 0's groups, under torchrun
        metrics["bad_layers"] = sum(bad_layers) / len(bad_layers)
    return StepResult(manifests={"rollouts": manifest}, metrics=metrics)


main = functools.partial(
    step_main, run, iteration_from="policy", iteration_offset=1, beyond=("rollouts", "rollouts"),
    spread=ranks.spread, store=open_store,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
