"""The step `update_lora`: group-relative advantages from the scores, gradients from the trajectories, optimizer steps
on the adapter, committed together with the optimizer's state.

Under torchrun every rank runs this; microbatches are distributed, gradients summed, and rank 0 writes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import (
    broadcast_json,
    failing_together,
    process_group,
    rank,
    shares_base,
    world_size,
)
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.messages import counted
from layerloop.components.schema.steps import STEPS
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.groups import Group
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import add_folder
from layerloop.components.storage.owners import scratch_folder
from layerloop.components.storage.retention import apply_retention
from layerloop.components.storage.rollouts import rollouts_sha256
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.update_lora.advantages import Advantages
    from layerloop.components.update_lora.diagnostics import Diagnostics
    from layerloop.components.update_lora.plan import OptimizerStep
    from layerloop.components.update_lora.state import TrainingState


def run(
    loaded: LoadedPolicy | None = None, *, campaign: str, iteration: int | None = None, runtime: str = ""
) -> StepResult:
    """Update the adapter from one iteration's rollouts and scores.

    Args:
        loaded: A policy of this campaign that is in memory already, of whatever iteration: its base is used.
        campaign: Root URI of the campaign.
        iteration: The iteration to learn from; by default the one after the last committed policy.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Raises:
        LayerloopError: rollouts or scores are missing, or of another model, adapter or schema version; NaN in latents
            or rewards; a gradient that is not finite or explodes. Nothing is committed then.
    """
    started = time.monotonic()
    opened = Campaign.open(campaign, runtime)
    current = opened.open_iteration(iteration)
    folder = opened.policy_dir(current)
    if (done := opened.already_committed(folder, log=log)) is not None:
        return StepResult(manifests={"policy": done}, metrics=policy_metrics(done))
    with hold(opened.store, log=log):
        if (done := opened.already_committed(folder, log=log)) is not None:  # by the run that held it until now
            return StepResult(manifests={"policy": done}, metrics=policy_metrics(done))
        with process_group() as device:
            learning = begin_update(opened, current, device=device, loaded=loaded, scored=True)
            done = end_update(opened, current, learning)
            if rank() == 0:
                apply_retention(opened, log=log)
    seconds = time.monotonic() - started
    return StepResult(manifests={"policy": done}, metrics=policy_metrics(done) | {"seconds": seconds})


@dataclass(frozen=True)
class Learning:
    """An update before it knows the scores: the policy that learns, its state, and the weights that sampled where they
    are others than the state's."""

    loaded: LoadedPolicy
    state: TrainingState
    sampler_sha256: str | None  # of the adapter that sampled
    reading: Reading | None


def begin_update(
    campaign: Campaign, iteration: int, *, device: torch.device, loaded: LoadedPolicy | None, scored: bool = False
) -> Learning:
    """What an update can do before the iteration is scored: the policy, and the optimizer's state.

    Args:
        loaded: A policy of this campaign in memory, of whatever iteration: its base is used.
        scored: The scores are there already, so that trajectories are read while the policy loads.
    """
    from layerloop.components.update_lora.state import TrainingState

    with failing_together():
        previous = campaign.policy(iteration - 1)
        reading = Reading(campaign, iteration) if scored else None
        sharded = shares_base(campaign.runtime.model)
        sampler = campaign.recipe.rollout.sampler(iteration)
        at = functools.partial(policy_at, campaign, device=device, sharded=sharded, trainable=True)
        weights = None
        if sampler != iteration - 1:
            loaded = at(sampler, loaded=loaded)
            weights = {name: p.detach().clone() for name, p in loaded.policy.trainable_parameters().items()}
            sampled = loaded.adapter_sha256
        loaded = at(iteration - 1, loaded=loaded)
        state = TrainingState.resume(loaded.policy, campaign.recipe.update, campaign.store, previous, iteration)
        if weights is not None:
            state.sampled_with(weights)
        else:
            sampled = loaded.adapter_sha256
    return Learning(loaded, state, sampled, reading)


def end_update(campaign: Campaign, iteration: int, learning: Learning) -> Manifest:
    """Learn from the scored iteration and commit the policy, on all ranks.

    Raises:
        LayerloopError: as `run`.
    """
    from layerloop.components.update_lora.algorithm import timesteps_of
    from layerloop.components.update_lora.learner import learn
    from layerloop.components.update_lora.trajectories import Expected, share_trajectories

    recipe, policy = campaign.recipe, learning.loaded.policy
    with failing_together():
        reading = learning.reading or Reading(campaign, iteration)
        if rank() == 0:
            _log_advantages(reading.advantages, iteration)
        shards = reading.shards()
    expected = Expected(
        iteration, policy.fingerprint, learning.sampler_sha256, recipe.update.algorithm, timesteps_of(recipe),
        velocities=recipe.rollout.keep_velocities, token_pixels=policy.pixel_multiple, channels=policy.packed_channels,
    )  # fmt: skip
    with failing_together():
        groups = share_trajectories(shards, reading.readers, reading.wanted, expected, rank())
    prompt_embeds = learning.loaded.prompt.to(policy.device, policy.dtype)
    diagnostics = learn(policy, learning.state, reading.steps, groups, prompt_embeds, recipe, iteration=iteration)
    with failing_together():
        manifest = None
        if rank() == 0:
            manifest = _commit(campaign, iteration, policy, learning.state, reading.advantages, diagnostics)
    return Manifest.model_validate(broadcast_json(manifest.model_dump(mode="json") if manifest else None))


class Reading:
    """The plan of a scored iteration, and this rank's shards of it, which a thread reads meanwhile."""

    def __init__(self, campaign: Campaign, iteration: int) -> None:
        from layerloop.components.update_lora.advantages import advantages_of
        from layerloop.components.update_lora.plan import candidates_of
        from layerloop.components.update_lora.trajectories import read_shards, reader_of

        rollouts = campaign.rollouts(iteration)
        _check_scored(campaign, iteration, rollouts)
        self.advantages = advantages_of(score_rows(campaign, iteration), campaign.recipe.update)
        self.steps = _plan(campaign, self.advantages)
        self.wanted = [candidates_of(self.steps, other) for other in range(world_size())]
        self.readers = reader_of(rollouts, self.wanted)
        pool = ThreadPoolExecutor(max_workers=1)
        self._shards = pool.submit(read_shards, campaign.store, rollouts, self.readers, rank())
        pool.shutdown(wait=False)

    def shards(self) -> dict[int, Group]:
        """The groups that this rank reads.

        Raises:
            LayerloopError: a shard is missing or damaged.
        """
        return self._shards.result()


def score_rows(campaign: Campaign, iteration: int) -> list[ScoreRow]:
    """The score of every candidate of an iteration, masked ones among them.

    Raises:
        LayerloopError: the scores are not committed, or damaged.
    """
    return [
        ScoreRow.from_json(members["json"], where=f"{campaign.uri}/{shard.name}:{key}.json")
        for shard in campaign.scores(iteration).shards
        for key, members in read_shard(campaign.store, shard, required=("json",))
    ]


def _check_scored(campaign: Campaign, iteration: int, rollouts: Mapping[int, Manifest]) -> None:
    """Refuse scores of other rollouts than those that are there; earlier versions did not say which they are of.

    Raises:
        LayerloopError: naming both.
    """
    scored, there = campaign.scores(iteration).metadata.get("rollouts_sha256"), rollouts_sha256(rollouts)
    if scored not in (None, there):
        raise LayerloopError(
            f"{campaign.uri}/{campaign.scores_dir(iteration)} is of rollouts {scored!s:.12}, those that are there have "
            f"{there:.12}: delete {campaign.scores_dir(iteration)}/{MANIFEST} to have them scored"
        )


def _plan(campaign: Campaign, advantages: Advantages) -> tuple[OptimizerStep, ...]:
    """The iteration's optimizer steps, distributed among the ranks."""
    from layerloop.components.update_lora.algorithm import timesteps_of
    from layerloop.components.update_lora.plan import plan_steps

    return plan_steps(
        advantages.groups,
        steps=campaign.recipe.update.steps,
        timesteps=timesteps_of(campaign.recipe),
        microbatch=campaign.runtime.update.microbatch,
        ranks=world_size(),
        pad=campaign.runtime.model.fsdp,
        by_timestep=campaign.recipe.rollout.keep_velocities,
    )


def _log_advantages(advantages: Advantages, iteration: int) -> None:
    """Log how many groups are learned from and why others are left out."""
    left_out = {
        "of equal rewards": len(advantages.zero_std_groups),
        "with fewer than two valid candidates": len(advantages.underfilled_groups),
        "of weight 0": len(advantages.zero_weight_groups),
    }
    parts = [
        f"iteration {iteration}: mean reward {advantages.reward_mean:.3f}, spread within groups "
        f"{advantages.reward_std:.3f}; learning from {counted(len(advantages.groups), 'groups')}",
        *(f"{counted(count, 'groups')} {reason} left out" for reason, count in left_out.items() if count),
        *([f"{counted(advantages.masked, 'candidates')} without a score"] if advantages.masked else []),
    ]
    log("; ".join(parts))
    if not advantages.groups:
        log(f"iteration {iteration}: no group gives a gradient, so the adapter is committed unchanged")


def _commit(
    campaign: Campaign,
    iteration: int,
    policy: LayeredPolicy,
    state: TrainingState,
    advantages: Advantages,
    diagnostics: Diagnostics,
) -> Manifest:
    """Write adapter and state, then the manifest that makes them count."""
    folder = campaign.policy_dir(iteration)
    with scratch_folder() as temporary:
        paths = state.write(policy, temporary, base=campaign.recipe.model.base)
        if (done := campaign.find(folder)) is not None:  # another attempt was faster: its files stay
            return done
        files = add_folder(campaign.store, folder, {path.name: path for path in paths})
    norms = diagnostics.gradient_norms
    manifest = Manifest(
        kind="policy",
        iteration=iteration,
        files=files,
        counts={
            "groups": len(advantages.groups),
            "groups_filtered": advantages.filtered_groups,
            "candidates": sum(len(group.candidates) for group in advantages.groups),
            "candidates_masked": advantages.masked,
            "optimizer_steps": state.counters.optimizer_steps,
            "adapter_parameters": sum(parameter.numel() for parameter in state.parameters.values()),
        },
        metadata={
            "adapter_sha256": files[0].sha256,
            "base_fingerprint": policy.fingerprint,
            "base": campaign.recipe.model.base,
            "previous_adapter_sha256": campaign.policy(iteration - 1).metadata.get("adapter_sha256"),
            "scores_sha256": [shard.sha256 for shard in campaign.scores(iteration).shards],
            "algorithm": campaign.recipe.update.algorithm,
            "filtered_fraction": advantages.filtered_fraction,
            "reward_mean": advantages.reward_mean,
            "reward_std": advantages.reward_std,
            "advantage_std": advantages.advantage_std,
            "advantages_clipped": advantages.clipped,
            "gradient_norms": list(norms),
            "gradient_norm": max(norms, default=0.0),
            **diagnostics.summary(),
            "per_timestep": {name: list(row) for name, row in diagnostics.per_timestep().items()},
        },
    )
    return campaign.commit(folder, manifest)


def policy_metrics(manifest: Manifest) -> dict[str, float]:
    """Metrics of a committed policy."""
    numbers = {**manifest.counts, **manifest.metadata}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}


main = functools.partial(
    step_main, run, step=STEPS["update_lora"], beyond=("policy", "previous"),
    launch=ranks.launch_per_gpu, store=open_store,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
